// Stands in for a GPU: runs step.cu on the CPU as C++, every thread of the grid a fiber of its own.
//
// __syncthreads is honoured: a fiber that comes to it goes on when all of its block have. Who runs next is drawn by
// chance, over all blocks of the grid, at each barrier and at each atomic, so an order that CUDA does not promise shows.
// It cannot show what comes of weaker memory than a CPU's: a missing fence, an atomic that is none.
#include <cstring>
#include <memory>
#include <random>
#include <ucontext.h>
#include <vector>

#define __global__
#define __device__ static
struct Index { unsigned x, y; };
static Index blockIdx, threadIdx, blockDim, gridDim;

static double __longlong_as_double(long long bits) { double x; std::memcpy(&x, &bits, 8); return x; }
static long long __double_as_longlong(double x) { long long bits; std::memcpy(&bits, &x, 8); return bits; }

struct Fiber {
    ucontext_t context;
    Index block, thread;
    int barriers = 0;  // that it has come to
    bool done = false;
};
static std::vector<Fiber> fibers;
static std::vector<std::unique_ptr<char[]>> stacks;  // kept from launch to launch
static const size_t STACK = 32768;
static ucontext_t scheduler;
static int current;
static void (*body)();

static void give_way() { swapcontext(&fibers[current].context, &scheduler); }
static void __syncthreads() { ++fibers[current].barriers; give_way(); }
static void __threadfence() {}
static unsigned atomicAdd(unsigned *at, unsigned more)
{
    unsigned before = *at;
    *at += more;
    give_way();
    return before;
}
static void run() { body(); fibers[current].done = true; }

// Whether every fiber of its block has come to as many barriers, or has returned.
static bool may_run(const Fiber &fiber)
{
    for (const Fiber &other : fibers)
        if (!other.done && other.block.x == fiber.block.x && other.block.y == fiber.block.y && other.barriers < fiber.barriers)
            return false;
    return true;
}

static void run_grid(Index grid, unsigned threads, unsigned seed, void (*kernel)())
{
    std::mt19937 chance(seed);
    gridDim = grid, blockDim = {threads, 1}, body = kernel;
    fibers = std::vector<Fiber>(grid.x * grid.y * threads);
    while (stacks.size() < fibers.size())
        stacks.emplace_back(new char[STACK]);
    for (unsigned i = 0; i < fibers.size(); ++i) {
        Fiber &fiber = fibers[i];
        fiber.block = {i / threads % grid.x, i / threads / grid.x}, fiber.thread = {i % threads, 0};
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = stacks[i].get(), fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, run, 0);
    }
    std::vector<int> left(fibers.size());
    for (unsigned i = 0; i < left.size(); ++i)
        left[i] = i;
    while (!left.empty()) {
        unsigned pick = chance() % left.size();
        current = left[pick];
        if (!may_run(fibers[current]))
            continue;
        blockIdx = fibers[current].block, threadIdx = fibers[current].thread;
        swapcontext(&scheduler, &fibers[current].context);
        if (fibers[current].done)
            left[pick] = left.back(), left.pop_back();
    }
}
