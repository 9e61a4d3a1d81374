// The machinery of cuda_on_cpu.h, compiled once.
#include "cuda_on_cpu.h"

#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_cpu {

constexpr size_t STACK = 256 * 1024;
constexpr int WARP = 32;

struct Barrier {
    int arrived = 0;
    unsigned generation = 0;
};

struct Copy {
    void* shared;
    const void* source;
    int valid;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Index index{};
    bool done = false;
    unsigned shuffles = 0;
    unsigned votes = 0;
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> groups;
    void* fake_stack = nullptr;
};

struct Block {
    Index index{};
    unsigned threads = 0;
    std::vector<Fiber> fibers;
    unsigned current = 0;
    ucontext_t scheduler;
    void* scheduler_fake_stack = nullptr;
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_size = 0;
    Barrier all;
    std::vector<Barrier> warps;
    std::vector<float> lanes[2];
    unsigned char* shared = nullptr;
    bool any[3] = {false, false, false};
    bool progress = false;
    bool clash = false;
    bool beyond = false;
    void (*kernel)(const void*) = nullptr;
    const void* args = nullptr;
};

thread_local Block* block = nullptr;
Index grid;

static Fiber& fiber() { return block->fibers[block->current]; }

static void leave_fiber(bool for_good) {
    Fiber& from = fiber();
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, block->scheduler_stack, block->scheduler_stack_size);
#endif
    (void)for_good;
    swapcontext(&from.context, &block->scheduler);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(from.fake_stack, &block->scheduler_stack, &block->scheduler_stack_size);
#endif
}

void yield() { leave_fiber(false); }

static void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_stack_size);
#endif
    block->kernel(block->args);
    fiber().done = true;
    block->progress = true;
    leave_fiber(true);
}

static void wait(Barrier& barrier, int members) {
    unsigned generation = barrier.generation;
    if (++barrier.arrived == members) {
        barrier.arrived = 0;
        barrier.generation++;
        block->progress = true;
        return;
    }
    while (barrier.generation == generation) yield();
}

void wait_warp() { wait(block->warps[block->current / WARP], WARP); }

float shuffle_xor(float value, int mask) {
    std::vector<float>& lanes = block->lanes[fiber().shuffles++ & 1];  // two in turn: a lane may run ahead by one shuffle, never by two
    lanes[block->current] = value;
    wait_warp();
    return lanes[block->current ^ mask];
}

void copy_later(void* shared, const void* source, int valid) {
    auto meets = [&](const std::vector<Copy>& copies) {
        for (const Copy& copy : copies)
            if (copy.shared == shared) return true;
        return false;
    };
    block->clash |= meets(fiber().open);
    for (const auto& group : fiber().groups) block->clash |= meets(group);
    memset(shared, 0xff, 16);
    fiber().open.push_back({shared, source, valid});
}
void copy_commit() {
    fiber().groups.push_back(std::move(fiber().open));
    fiber().open.clear();
}
void copy_wait(size_t pending) {
    auto& groups = fiber().groups;
    while (groups.size() > pending) {
        for (const Copy& copy : groups.front()) {
            memset(copy.shared, 0, 16);
            if (copy.valid) memcpy(copy.shared, copy.source, copy.valid);
        }
        groups.erase(groups.begin());
    }
}

unsigned char* shared_memory() { return block->shared; }
const Index& thread_index() { return fiber().index; }
const Index& block_index() { return block->index; }
const Index& grid_size() { return grid; }
void wait_block() { wait(block->all, block->threads); }
bool any_of_block(bool value) {
    bool& any = block->any[fiber().votes++ % 3];  // three in turn: one is read, one collects, one is cleared
    block->any[fiber().votes % 3] = false;
    any |= value;
    wait_block();
    return any;
}

// Runs the fibers of one block to their ends; STUCK if all of them wait and nothing moves. `alone`: no other block can end their wait.
static Outcome run_fibers(Block& b, bool alone) {
    for (;;) {
        bool left = false;
        b.progress = false;
        for (b.current = 0; b.current < b.threads; b.current++) {
            Fiber& f = b.fibers[b.current];
            if (f.done) continue;
            left = true;
#ifdef __SANITIZE_ADDRESS__
            __sanitizer_start_switch_fiber(&b.scheduler_fake_stack, f.stack.get(), STACK);
#endif
            swapcontext(&b.scheduler, &f.context);
            if (b.beyond) break;
#ifdef __SANITIZE_ADDRESS__
            __sanitizer_finish_switch_fiber(b.scheduler_fake_stack, nullptr, nullptr);
#endif
        }
        if (b.beyond) return BEYOND;
        if (!left) return b.clash ? CLASH : FINE;
        if (!b.progress && alone) return STUCK;
        if (!b.progress) std::this_thread::yield();
    }
}

// Memory that ends where a page begins that nobody may touch.
struct Guarded {
    size_t page = sysconf(_SC_PAGESIZE), size;
    unsigned char *pages, *data;

    explicit Guarded(size_t bytes) : size((bytes + page - 1) / page * page) {
        pages = (unsigned char*)mmap(nullptr, size + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        mprotect(pages + size, page, PROT_NONE);
        data = pages + (size - bytes) / 16 * 16;
    }
    ~Guarded() { munmap(pages, size + page); }
};

// A fiber that touched such a page does not go on: its block ends.
static void stop_fiber(int, siginfo_t*, void*) {
    if (!block) _exit(139);
    block->beyond = true;
    setcontext(&block->scheduler);
}

struct Watch {
#ifndef __SANITIZE_ADDRESS__  // which says itself what happened
    struct sigaction before;
    Watch() {
        struct sigaction watch = {};
        watch.sa_sigaction = stop_fiber;
        watch.sa_flags = SA_SIGINFO | SA_NODEFER;
        sigaction(SIGSEGV, &watch, &before);
    }
    ~Watch() { sigaction(SIGSEGV, &before, nullptr); }
#else
    Watch() {}
    ~Watch() {}
#endif
};

static Outcome run_block(unsigned number, unsigned threads, size_t shared_bytes, void (*kernel)(const void*), const void* args, bool alone) {
    Block b;
    const Guarded shared(shared_bytes);
    b.shared = shared.data;
    memset(b.shared, 0xff, shared_bytes);  // NaN
    b.index.x = number;
    b.threads = threads;
    b.fibers.resize(threads);
    b.warps.resize((threads + WARP - 1) / WARP);
    for (auto& lanes : b.lanes) lanes.resize(threads);
    b.kernel = kernel;
    b.args = args;
    block = &b;
    for (unsigned i = 0; i < threads; i++) {
        Fiber& f = b.fibers[i];
        f.index.x = i;
        f.stack.reset(new char[STACK]);
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get();
        f.context.uc_stack.ss_size = STACK;
        f.context.uc_link = nullptr;
        makecontext(&f.context, fiber_main, 0);
    }
    const Outcome outcome = run_fibers(b, alone);
    block = nullptr;
    return outcome;
}

Outcome run(unsigned blocks, unsigned threads, size_t shared_bytes, unsigned at_once, void (*kernel)(const void*), const void* args) {
    const Watch watch;
    grid.x = blocks;
    std::atomic<unsigned> next{0};
    std::atomic<Outcome> outcome{FINE};
    auto work = [&] {
        for (unsigned number; (number = next++) < blocks && outcome == FINE;)
            if (const Outcome found = run_block(number, threads, shared_bytes, kernel, args, at_once == 1)) outcome = found;
    };
    std::vector<std::thread> workers;
    for (unsigned i = 1; i < at_once; i++) workers.emplace_back(work);
    work();
    for (auto& worker : workers) worker.join();
    return outcome;
}

}  // namespace cuda_on_cpu
