// CUDA threads on the processor: every one is a fibre, and gives way where it waits. For decode_on_cpu.h and wide_on_cpu.h.
#include <ucontext.h>

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
    for (bool left = true; left;) {
        left = false;
        if (idle++ > 1000) fail("all threads wait");
        for (auto &fibre : fibres)
            if (!fibre->done) {
                left = true;
                running = fibre.get();
                swapcontext(&scheduler, &running->context);
            }
    }
}

inline float of_bits(unsigned bits) { float f; std::memcpy(&f, &bits, 4); return f; }
inline unsigned bits_of(float f) { unsigned bits; std::memcpy(&bits, &f, 4); return bits; }
