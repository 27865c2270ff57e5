// CUDA threads on the processor: every one is a fibre, and gives way where it waits. For decode_on_cpu.h and
// wide_on_cpu.h.
#include <sys/mman.h>
#include <ucontext.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

struct Meeting { // a barrier of `size` fibres
    int size = 0, here = 0, round = 0;
};
struct BareFibre {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
    bool after = false; // whether it has waited for the end of the kernel before
};
static BareFibre *running;
static ucontext_t scheduler;
static long idle; // switches since something happened
static std::function<void()> body;

inline void give_way() { swapcontext(&running->context, &scheduler); }
inline void meet(Meeting &m) {
    const int round = m.round;
    if (++m.here == m.size) m.here = 0, m.round++, idle = 0;
    while (m.round == round) give_way();
}
inline void fail(const char *what) {
    std::fprintf(stderr, "on the CPU: %s\n", what);
    std::abort();
}

// What the kernel before may still write or read: who touches it without having waited for that one's end, fails.
constexpr long ROOM = 1 << 26, GAP = 256; // bytes, and those around results that nothing is written to
constexpr unsigned char EMPTY = 0x5a;
static unsigned char *const room =
    (unsigned char *)mmap(nullptr, ROOM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
static long guarded_bytes;
static bool unlocked = true;
inline void unlock(bool now) {
    if (now != unlocked) mprotect(room, ROOM, now ? PROT_READ | PROT_WRITE : PROT_NONE);
    unlocked = now;
}
template <class T> T *guarded(T *from, long bytes) { // a copy there, as aligned as what it is a copy of
    if (from == nullptr) return from;
    unsigned char *const to = room + guarded_bytes + GAP + (unsigned long)from % GAP;
    guarded_bytes += (bytes + 4 * GAP) / GAP * GAP;
    if (guarded_bytes > ROOM) fail("too much to guard");
    std::memset(to - GAP, EMPTY, bytes + 2 * GAP);
    std::memcpy((void *)to, from, bytes);
    return (T *)to;
}
inline void give_back(void *to, const void *results, long bytes) { // and forget all copies
    const unsigned char *from = (const unsigned char *)results;
    for (int i = 0; i < GAP; i++)
        if (from[i - GAP] != EMPTY || from[bytes + i] != EMPTY) fail("something is written beside the results");
    std::memcpy(to, from, bytes);
    guarded_bytes = 0;
}
inline void touched(int) { fail("memory is touched before the kernel before this one has ended, or is none"); }

inline void start_fibre() {
    body();
    running->done = true;
    idle = 0;
    give_way();
}
inline void prepare(BareFibre &fibre) { // to run `body`
    constexpr int STACK = 65536;
    fibre.stack.reset(new char[STACK]);
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = STACK;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, start_fibre, 0);
}
template <class Fibre> void run_all(const std::vector<std::unique_ptr<Fibre>> &fibres) {
    const auto others = std::signal(SIGSEGV, touched);
    for (bool left = true; left;) {
        left = false;
        if (idle++ > 1000) fail("all threads wait");
        for (auto &fibre : fibres)
            if (!fibre->done) {
                left = true;
                running = fibre.get();
                unlock(running->after);
                swapcontext(&scheduler, &running->context);
            }
    }
    unlock(true);
    std::signal(SIGSEGV, others);
}

inline float of_bits(unsigned bits) { float f; std::memcpy(&f, &bits, 4); return f; }
inline unsigned bits_of(float f) { unsigned bits; std::memcpy(&bits, &f, 4); return bits; }
