// step.cu as a function of a shared library; SOURCE is the kernel with its constants.
#include "cuda.h"
#include <cmath>
#include SOURCE

static struct {
    Slot *slots;
    int first;
    const float *rows, *embedding;
    float *x, *x0, *temb;
    const float *prediction, *given;
    int size, outputs, width;
} a;

static void call() { step(a.slots, a.first, a.rows, a.embedding, a.x, a.x0, a.temb, a.prediction, a.given, a.size,
                          a.outputs, a.width); }

extern "C" void launch(unsigned blocks, unsigned slots_in_grid, unsigned threads, unsigned seed, Slot *slots, int first,
                       const float *rows, const float *embedding, float *x, float *x0, float *temb, const float *prediction,
                       const float *given, int size, int outputs, int width)
{
    a = {slots, first, rows, embedding, x, x0, temb, prediction, given, size, outputs, width};
    run_grid({blocks, slots_in_grid}, threads, seed, call);
}
