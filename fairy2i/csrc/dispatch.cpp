// The C interface: choosing an instruction set, repacking codes, and sharing the work of a call among threads.
#include "kernels.h"
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define EXPORT extern "C" __attribute__((visibility("default")))
enum { ABI = 4 };
typedef void (*Work)(Job*);

extern "C" void fairy2i_work_portable(Job*);
#if defined(FAIRY2I_X86)
extern "C" void fairy2i_work_avx2(Job*);
extern "C" void fairy2i_work_avx512(Job*);
static bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
static bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}
#elif defined(FAIRY2I_ARM)
#if defined(__linux__)
#include <sys/auxv.h>
static bool has_dot() { return getauxval(AT_HWCAP) >> 20 & 1; }  // HWCAP_ASIMDDP
#else
static bool has_dot() { return true; }  // every Apple processor that runs this
#endif
extern "C" void fairy2i_work_neon(Job*);
#endif

static bool always() { return true; }

struct Choice { const char* name; Work work; bool (*runs)(); };
static const Choice CHOICES[] = {  // best first
#if defined(FAIRY2I_X86)
    {"avx512", fairy2i_work_avx512, has_avx512},
    {"avx2", fairy2i_work_avx2, has_avx2},
#elif defined(FAIRY2I_ARM)
    {"neon", fairy2i_work_neon, has_dot},
#endif
    {"portable", fairy2i_work_portable, always},
};
enum { N_CHOICES = sizeof CHOICES / sizeof CHOICES[0] };
static const Choice* chosen = nullptr;

static const Choice* choice() {
    const Choice* now = __atomic_load_n(&chosen, __ATOMIC_ACQUIRE);
    if (now) return now;
    for (int i = 0; i < N_CHOICES; i++)
        if (CHOICES[i].runs()) { now = &CHOICES[i]; break; }
    __atomic_store_n(&chosen, now, __ATOMIC_RELEASE);
    return now;
}

EXPORT int32_t fairy2i_abi() { return ABI; }

// The name of instruction set `index`, best first, or null behind the last; `*runs` says whether it runs here.
EXPORT const char* fairy2i_instruction_set(int32_t index, int32_t* runs) {
    if (index < 0 || index >= N_CHOICES) return nullptr;
    *runs = CHOICES[index].runs();
    return CHOICES[index].name;
}

EXPORT const char* fairy2i_chosen() { return choice()->name; }

// Use another instruction set from now on: 0, or -1 where it is not built or does not run here.
EXPORT int32_t fairy2i_choose(const char* name) {
    for (int i = 0; i < N_CHOICES; i++)
        if (strcmp(CHOICES[i].name, name) == 0 && CHOICES[i].runs()) {
            __atomic_store_n(&chosen, &CHOICES[i], __ATOMIC_RELEASE);
            return 0;
        }
    return -1;
}

// ---- columns and codes

static int64_t cut(const Layer& layer, Segment* out) {  // returns the number of segments
    const int64_t width = layer.granularity == BY_TILE ? layer.tile : layer.cols, step = block_columns(layer.kind);
    int64_t count = 0, block = 0;
    for (int64_t begin = 0; begin < layer.cols;) {
        int64_t end = (begin / width + 1) * width;
        if (end > begin + SEGMENT) end = begin + SEGMENT;
        if (end > layer.cols) end = layer.cols;
        const int64_t blocks = (end - begin + step - 1) / step;
        if (out) out[count] = {begin, end, block, blocks, begin / width};
        count++, block += blocks, begin = end;
    }
    return count;
}

static int64_t row_blocks(const Layer& layer) { return (layer.rows + LANES - 1) / LANES; }

static int64_t all_blocks(const Layer& layer) {
    const int64_t width = layer.granularity == BY_TILE ? layer.tile : layer.cols, step = block_columns(layer.kind);
    int64_t blocks = 0;
    for (int64_t begin = 0; begin < layer.cols;) {
        int64_t end = (begin / width + 1) * width;
        if (end > begin + SEGMENT) end = begin + SEGMENT;
        if (end > layer.cols) end = layer.cols;
        blocks += (end - begin + step - 1) / step, begin = end;
    }
    return blocks;
}

// Words of the repacked codes.
EXPORT int64_t fairy2i_words(const Layer* layer) {
    return row_blocks(*layer) * layer->stages * all_blocks(*layer) * LANES;
}

// The bit of a word that holds the sign of column `c` (in its group) of nibble n = group * planes + plane; only for
// exact's bit 3 the meaning is turned around, see nibble_of.
static uint32_t nibble_of(uint32_t plus) {  // exact: 4 plus signs -> index; its own inverse apart from bit 3
    return plus & 8 ? plus & 7 : 8 | (~plus & 7);
}
static uint32_t plus_of(uint32_t nibble) { return nibble & 8 ? ~nibble & 7 : 8 | nibble; }

static uint32_t make_word(int32_t mode, const uint8_t plus[8]) {  // plus: 4 bits for each nibble
    uint32_t word = 0;
    for (int n = 0; n < 8; n++)
        if (mode == MODE_EXACT) word |= nibble_of(plus[n]) << (4 * n);
        else
            for (int c = 0; c < 4; c++) word |= static_cast<uint32_t>(plus[n] >> c & 1) << (8 * c + n);
    return word;
}

static void read_word(int32_t mode, uint32_t word, uint8_t plus[8]) {
    for (int n = 0; n < 8; n++) {
        plus[n] = 0;
        if (mode == MODE_EXACT) plus[n] = static_cast<uint8_t>(plus_of(word >> (4 * n) & 15));
        else
            for (int c = 0; c < 4; c++) plus[n] |= static_cast<uint8_t>((word >> (8 * c + n) & 1) << c);
    }
}

static int64_t row_bytes(const Layer& layer) {
    const int64_t bits = layer.kind == KIND_PHASE || layer.stages == 2 ? 2 : 1;
    return (layer.cols * bits + 7) / 8;
}

// Call visit(word, row, stage, first column, columns) for each word of rows that exist.
template <class Visit>
static int each_word(const Layer& layer, uint32_t* words, Visit visit) {
    const int64_t count = cut(layer, nullptr), blocks = all_blocks(layer), step = block_columns(layer.kind);
    Segment* segments = static_cast<Segment*>(malloc(count * sizeof(Segment)));
    if (!segments) return -1;
    cut(layer, segments);
    for (int64_t r = 0; r < row_blocks(layer); r++)
        for (int32_t t = 0; t < layer.stages; t++)
            for (int64_t s = 0; s < count; s++)
                for (int64_t b = 0; b < segments[s].blocks; b++) {
                    const int64_t first = segments[s].begin + b * step;
                    const int64_t columns = segments[s].end - first < step ? segments[s].end - first : step;
                    const int64_t pair = r & ~1, step = pair + 1 < row_blocks(layer) ? 2 * LANES : LANES;
                    uint32_t* word = words + pair * layer.stages * blocks * LANES +
                                     (t * blocks + segments[s].block + b) * step + (r & 1) * LANES;
                    for (int64_t lane = 0; lane < LANES && r * LANES + lane < layer.rows; lane++)
                        visit(word[lane], r * LANES + lane, t, first, columns);
                }
    free(segments);
    return 0;
}

// Tables from a byte of the checkpoint to its share of a word; the other shares are the same, shifted.
//     phase, and each plane of ternary: a byte is a group of 4 columns; binary: two groups.
struct Shares { uint32_t of[256]; };

static uint32_t spread(int32_t mode, int nibble, int plus) {  // 4 plus signs as nibble number `nibble` of a word
    uint8_t all[8] = {8, 8, 8, 8, 8, 8, 8, 8};                // 8 is 0 in the words of exact
    if (mode == MODE_INT8) memset(all, 0, sizeof all);
    all[nibble] = static_cast<uint8_t>(plus);
    return make_word(mode, all);
}

static Shares shares_of_phase(int32_t mode) {  // p and q of 4 codes
    Shares shares;
    for (int byte = 0; byte < 256; byte++) {
        int p = 0, q = 0;
        for (int c = 0; c < 4; c++) {
            const int code = byte >> (2 * c) & 3;
            p |= (code & 1) << c, q |= ((code & 1) ^ code >> 1) << c;
        }
        shares.of[byte] = spread(mode, 0, p) | spread(mode, 1, q);
    }
    return shares;
}

static Shares shares_of_real(int32_t mode, int32_t planes, int32_t plane) {
    Shares shares;
    for (int byte = 0; byte < 256; byte++) {
        int plus = 0;
        for (int c = 0; c < 4; c++) plus |= ((byte >> (2 * c) & 3) > plane) << c;
        shares.of[byte] = planes == 2 ? spread(mode, 0, plus) : spread(mode, 0, byte & 15) | spread(mode, 1, byte >> 4);
    }
    return shares;
}

// Repack the checkpoint's codes, rows on bytes, into `words`, which is filled here. Columns behind the last one of a
// segment read as code 0; their activations are 0.
EXPORT int32_t fairy2i_pack(const Layer* layer, const uint8_t* codes, uint32_t* words) {
    const int64_t bytes = row_bytes(*layer), rows = layer->rows;
    const int mode = layer->mode, shift = mode == MODE_EXACT ? 4 : 1;  // of one nibble to the next
    const int64_t per_byte = layer->kind == KIND_REAL && layer->stages == 1 ? 8 : 4;
    const bool phase = layer->kind == KIND_PHASE;
    // 4-byte rows of codes as the word wants them: [byte of the word's group][part]
    const Shares shares[2] = {phase ? shares_of_phase(mode) : shares_of_real(mode, layer->stages, 0),
                              phase ? Shares{} : shares_of_real(mode, layer->stages, 1)};
    memset(words, 0, fairy2i_words(layer) * 4);
    return each_word(*layer, words, [&](uint32_t& word, int64_t row, int32_t t, int64_t first, int64_t columns) {
        const int64_t parts = phase ? 2 : 1, groups = phase ? 2 : 8 * 4 / per_byte;
        uint32_t sum = 0;
        for (int64_t part = 0; part < parts; part++) {
            const uint8_t* from = codes + (phase ? (t * 2 + part) * rows + row : row) * bytes;
            for (int64_t g = 0; g < groups; g++) {
                const int64_t start = first + g * per_byte;
                int byte = 0;
                if (start < first + columns) {
                    byte = from[start / per_byte];
                    const int64_t off = start % per_byte, bits = 8 / per_byte;
                    if (off) {  // a tile that does not start on a byte
                        byte >>= off * bits;
                        if (start / per_byte + 1 < bytes) byte |= from[start / per_byte + 1] << ((per_byte - off) * bits);
                        byte &= 255;
                    }
                    if (first + columns - start < per_byte) byte &= (1 << ((first + columns - start) * bits)) - 1;
                }
                const int64_t nibble = phase ? g * 4 + part * 2 : g * per_byte / 4;
                sum |= shares[phase ? 0 : t].of[byte] << (nibble * shift);
            }
        }
        word = sum;
    });
}

// The inverse of fairy2i_pack: `codes` is zeroed here and gets the checkpoint's bytes.
EXPORT int32_t fairy2i_unpack(const Layer* layer, const uint32_t* words, uint8_t* codes) {
    const int64_t bytes = row_bytes(*layer), rows = layer->rows;
    const int mode = layer->mode;
    const bool phase = layer->kind == KIND_PHASE, ternary = layer->stages == 2;
    memset(codes, 0, phase ? layer->stages * 2 * rows * bytes : rows * bytes);
    uint32_t* source = const_cast<uint32_t*>(words);
    if (phase)
        return each_word(*layer, source, [=](uint32_t& word, int64_t row, int32_t t, int64_t first, int64_t columns) {
            uint8_t plus[8];
            read_word(mode, word, plus);
            for (int part = 0; part < 2; part++) {
                uint8_t* to = codes + ((t * 2 + part) * rows + row) * bytes;
                for (int64_t c = 0; c < columns; c++) {
                    const int p = plus[c / 4 * 4 + part * 2] >> (c % 4) & 1, q = plus[c / 4 * 4 + part * 2 + 1] >> (c % 4) & 1;
                    to[(first + c) / 4] |= static_cast<uint8_t>(((p ^ q) << 1 | p) << (2 * ((first + c) % 4)));
                }
            }
        });
    return each_word(*layer, source, [=](uint32_t& word, int64_t row, int32_t, int64_t first, int64_t columns) {
        uint8_t plus[8];
        read_word(mode, word, plus);
        for (int64_t c = 0; c < columns; c++) {  // ternary: the planes of a level are added
            const int64_t i = first + c;
            const int sign = plus[c / 4] >> (c % 4) & 1;
            if (ternary) codes[row * bytes + i / 4] = static_cast<uint8_t>(codes[row * bytes + i / 4] + (sign << (2 * (i % 4))));
            else codes[row * bytes + i / 8] |= static_cast<uint8_t>(sign << (i % 8));
        }
    });
}

// ---- threads

// torch brings an OpenMP runtime of its own, whose threads spin for a while behind each parallel region. Threads of ours
// would compete with them for the cores, so we ask for work from the same team: the caller hands over GOMP_parallel of
// the runtime that is loaded already (libgomp, and LLVM's and Intel's, have it). But a team has a barrier: where another
// program keeps a core busy, each call waits until the scheduler has run the thread that has nothing left to do, for
// milliseconds. Where that happens several times in short order, the next calls go to helpers of our own, which nobody
// waits for.
typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);
static Parallel parallel = nullptr;
EXPORT void fairy2i_set_parallel(Parallel function) { parallel = function; }

enum { TOO_LONG_NS = 1000000, CALLS_WITHOUT_TEAM = 1000, A_WAIT = 8, ENOUGH = 32 };
static int32_t without_team = 0;  // calls until the team gets another chance
static int32_t waits = 0;         // A_WAIT more for a call that waited, 1 less for one that did not

static int64_t now() {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000ll + time.tv_nsec;
}

struct Task { Work work; Job* jobs; int32_t count; pthread_t caller; int64_t done; };
static void run_task(void* data) {
    Task* task = static_cast<Task*>(data);
    for (int32_t i = 0; i < task->count; i++) task->work(&task->jobs[i]);
    if (pthread_equal(pthread_self(), task->caller)) task->done = now();
}

// Helpers sleep between calls and join whoever calls, if they wake up in time: the caller starts at once, and in the end
// waits for those alone that have joined. A core that something else keeps busy then costs what it would have brought,
// not a wait in each call, which is what a team with a barrier would make of it.
static struct {
    pthread_mutex_t owner = PTHREAD_MUTEX_INITIALIZER;  // one call at a time has the helpers
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t wake = PTHREAD_COND_INITIALIZER, left = PTHREAD_COND_INITIALIZER;
    Task* task = nullptr;
    int32_t seats = 0, joined = 0, helpers = 0;
} pool;

static void* help(void*) {
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        while (!pool.task || pool.seats <= 0) pthread_cond_wait(&pool.wake, &pool.lock);
        Task* task = pool.task;
        pool.seats--, pool.joined++;
        pthread_mutex_unlock(&pool.lock);
        run_task(task);
        pthread_mutex_lock(&pool.lock);
        if (__atomic_sub_fetch(&pool.joined, 1, __ATOMIC_RELEASE) == 0) pthread_cond_signal(&pool.left);
    }
    return nullptr;
}

static void forget_helpers() {  // in the child of a fork there are none
    pool.owner = PTHREAD_MUTEX_INITIALIZER, pool.lock = PTHREAD_MUTEX_INITIALIZER;
    pool.wake = PTHREAD_COND_INITIALIZER, pool.left = PTHREAD_COND_INITIALIZER;
    pool.task = nullptr, pool.seats = pool.joined = pool.helpers = 0;
}

static void share(Task* task, int32_t threads) {
    task->caller = pthread_self();
    if (parallel && threads > 1 && __atomic_load_n(&without_team, __ATOMIC_RELAXED) <= 0) {
        parallel(run_task, task, static_cast<unsigned>(threads), 0);
        if (task->jobs[0].tokens > 4) return;  // parts are large: waiting says nothing
        int32_t score = __atomic_load_n(&waits, __ATOMIC_RELAXED);
        score = now() - task->done > TOO_LONG_NS ? score + A_WAIT : score > 0 ? score - 1 : 0;
        if (score >= ENOUGH) {
            score = 0;
            __atomic_store_n(&without_team, CALLS_WITHOUT_TEAM, __ATOMIC_RELAXED);
        }
        __atomic_store_n(&waits, score, __ATOMIC_RELAXED);
        return;
    }
    if (__atomic_load_n(&without_team, __ATOMIC_RELAXED) > 0) __atomic_sub_fetch(&without_team, 1, __ATOMIC_RELAXED);
    if (threads <= 1 || pthread_mutex_trylock(&pool.owner)) return run_task(task);
    static bool watched = false;
    if (!watched) watched = pthread_atfork(nullptr, nullptr, forget_helpers) == 0;
    pthread_mutex_lock(&pool.lock);
    while (pool.helpers < threads - 1) {
        pthread_t helper;
        if (pthread_create(&helper, nullptr, help, nullptr)) break;  // the rest does without
        pthread_detach(helper);
        pool.helpers++;
    }
    pool.task = task, pool.seats = threads - 1;
    pthread_mutex_unlock(&pool.lock);
    if (threads == 2) pthread_cond_signal(&pool.wake);
    else pthread_cond_broadcast(&pool.wake);
    run_task(task);
    pthread_mutex_lock(&pool.lock);
    pool.task = nullptr, pool.seats = 0;
    pthread_mutex_unlock(&pool.lock);
    for (int spin = 0; spin < 4000 && __atomic_load_n(&pool.joined, __ATOMIC_ACQUIRE); spin++) {
#if defined(FAIRY2I_X86)
        __builtin_ia32_pause();
#endif
    }
    pthread_mutex_lock(&pool.lock);
    while (pool.joined) pthread_cond_wait(&pool.left, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
    pthread_mutex_unlock(&pool.owner);
}

static bool prepare_job(Job& job, const Layer& layer, int64_t tokens, int32_t threads, Segment* few, int64_t many) {
    job.layer = layer, job.tokens = tokens;
    job.n_segments = cut(layer, nullptr);
    Segment* segments = job.n_segments <= many ? few : static_cast<Segment*>(malloc(job.n_segments * sizeof(Segment)));
    if (!segments) return false;
    cut(layer, segments);
    job.segments = segments, job.row_blocks = row_blocks(layer);
    job.blocks = segments[job.n_segments - 1].block + segments[job.n_segments - 1].blocks;
    if (tokens <= 4) {  // small parts, so that a thread that is held up does not hold up all
        job.token_block = tokens, job.n_token_blocks = 1;
        job.n_ranges = threads == 1 ? 1 : threads * 4;
    } else {
        const int64_t most = layer.mode == MODE_INT8 ? 128 : 48;
        job.token_block = tokens < most ? tokens : most;
        job.n_token_blocks = (tokens + job.token_block - 1) / job.token_block;
        job.token_block = (tokens + job.n_token_blocks - 1) / job.n_token_blocks;
        job.n_ranges = threads * 2;
    }
    if (job.n_ranges > (job.row_blocks + 1) / 2) job.n_ranges = (job.row_blocks + 1) / 2;
    return true;
}

// Multiply each block of `width` numbers by a Hadamard matrix: sums in the order of fairy2i/rotation.py, the same bits.
static void rotate(const float* x, float* out, int64_t count, int64_t width) {
    float scale = 1;
    for (int64_t w = width; w > 1; w /= 4) scale /= 2;
    for (int64_t block = 0; block < count; block += width) {
        float* v = out + block;
        for (int64_t i = 0; i < width; i += 4) {  // the first two levels: neighbours, and pairs of neighbours
            const float* u = x + block + i;
            const float a = u[0] + u[1], b = u[0] - u[1], c = u[2] + u[3], d = u[2] - u[3];
            v[i] = a + c, v[i + 1] = b + d, v[i + 2] = a - c, v[i + 3] = b - d;
        }
        for (int64_t h = 4; h < width; h *= 2)
            for (int64_t i = 0; i < width; i += 2 * h)
                for (int64_t j = i; j < i + h; j++) {
                    const float a = v[j], b = v[j + h];
                    v[j] = a + b, v[j + h] = a - b;
                }
        for (int64_t i = 0; i < width; i++) v[i] *= scale;
    }
}

// y = x w^T + bias for up to 8 layers of the same activations, which are float32 where the layers rotate them, all by
// the same blocks. Returns 0, or -1 when memory ran out.
EXPORT int32_t fairy2i_linear(int32_t count, const Layer* const* layers, const void* x, void* const* y,
                              const float* const* bias, int64_t tokens, int32_t dtype, int32_t threads) {
    if (tokens <= 0) return 0;
    if (count < 1 || count > 8) return -1;
    enum { FEW = 32 };
    Segment few[8][FEW];
    Job jobs[8] = {};
    int64_t size = 0;  // in blocks of 64 bytes
    for (int32_t i = 0; i < count; i++) size += fairy2i_words(layers[i]) / LANES * tokens;
    if (size < 256) threads = 1;
    int32_t failed = 0;
    float* rotated = nullptr;
    if (layers[0]->rotation > 1) {
        const int64_t features = layers[0]->cols * (layers[0]->kind == KIND_PHASE ? 2 : 1);
        rotated = static_cast<float*>(malloc(tokens * features * sizeof(float)));
        if (!rotated || dtype != DTYPE_F32) { free(rotated); return -1; }
        rotate(static_cast<const float*>(x), rotated, tokens * features, layers[0]->rotation);
        x = rotated;
    }
    for (int32_t i = 0; i < count && !failed; i++) {
        failed = !prepare_job(jobs[i], *layers[i], tokens, threads, few[i], FEW);
        jobs[i].x = x, jobs[i].y = y[i], jobs[i].bias = bias[i], jobs[i].dtype = dtype;
    }
    Task task = {choice()->work, jobs, count, {}, 0};
    if (!failed) share(&task, threads);
    for (int32_t i = 0; i < count; i++) {
        if (jobs[i].segments != few[i]) free(const_cast<Segment*>(jobs[i].segments));
        failed |= jobs[i].failed;
    }
    free(rotated);
    return failed ? -1 : 0;
}
