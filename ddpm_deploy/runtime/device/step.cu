// One step of every chain: x̂0, the update, its noise, the next timestep's embedding, the next row.
//
// Plain CUDA C. Each product and sum is rounded by itself, in the order of reference.py (compile with --fmad=false), so
// that x, x̂0 and the noise are NumPy's to the bit. A thread makes the four numbers of one Philox block.
#define COLUMNS 12
enum { T, A, B, LO, HI, C, D, E, F, G, LN_VAR_MIN, LN_VAR_MAX };

struct Slot {
    int row, end;                // of the rows; row 0 is a slot with nothing to do
    unsigned int key[2];         // the seed's low and high half
    unsigned int sample[2];      // the sample index's
    int partner;                 // of guidance: the slot of the unconditional row; -1: none
    float scale;                 // of guidance
    unsigned int given;          // whether a caller gives its noise
    unsigned int arrived;        // blocks of the slot that have read it
    unsigned int broken;         // whether a number of x or the prediction was not finite
    int share_until;             // x_T and the steps from t on have the noise of sample 0; -1: none
};

__device__ void philox4x32(unsigned int c[4], unsigned int k0, unsigned int k1)
{
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        unsigned long long p0 = 0xD2511F53ull * c[0], p1 = 0xCD9E8D57ull * c[2];
        unsigned int a = (unsigned int)(p1 >> 32) ^ c[1] ^ k0, b = (unsigned int)(p0 >> 32) ^ c[3] ^ k1;
        c[0] = a, c[1] = (unsigned int)p1, c[2] = b, c[3] = (unsigned int)p0;
    }
}

__device__ double polynomial(const double *series, int terms, double x)
{
    double value = x * series[terms - 1];
    for (int i = terms - 2; i > 0; --i)
        value = (value + series[i]) * x;
    return value + series[0];
}

__device__ void box_muller(unsigned int r0, unsigned int r1, float z[2])  // noise.py
{
    const double ln[] = {LN_SERIES}, sin_pi[] = {SIN_PI_SERIES}, cos_pi[] = {COS_PI_SERIES};
    double u0 = (r0 + 0.5) * 0x1p-32, v = (r1 + 0.5) * 0x1p-32 - 0.5;
    long long bits = __double_as_longlong(u0), k = (bits - SQRT_HALF_BITS) >> 52;
    double m = __longlong_as_double(bits - (k << 52)), s = (m - 1.0) / (m + 1.0);
    float radius = sqrtf((float)(-2.0 * (polynomial(ln, 6, s * s) * s + (double)k * LN_2)));
    double sine = polynomial(sin_pi, 6, v * v) * v, cosine = polynomial(cos_pi, 6, v * v), twice = -2.0 * sine;
    z[0] = radius * (float)(-1.0 - twice * sine);
    z[1] = radius * (float)(twice * cosine);
}

__device__ float exponential(float w)  // exponential.py
{
    const double series[] = {EXP_SERIES};
    w = w < -LARGEST ? -LARGEST : w > LARGEST ? LARGEST : w;  // NaN stays
    double rounded = (double)w * LOG2_E + 0x1.8p52, k = rounded - 0x1.8p52;  // to a whole number, to even
    double power = __longlong_as_double((__double_as_longlong(rounded) + 1023) << 52);  // 2ᵏ, from its low bits
    return (float)(polynomial(series, 7, (double)w - k * LN_2) * power);
}

// A term with no coefficient is not there: 0 times an infinity would be NaN.
__device__ float term(float coefficient, float value) { return coefficient == 0.0f ? 0.0f : coefficient * value; }

__device__ void update(const float *row, float *x, float *x0, float out, float v, float z)  // solvers.py
{
    float estimate = term(row[A], *x) + term(row[B], out), next;
    estimate = estimate < row[LO] ? row[LO] : estimate > row[HI] ? row[HI] : estimate;
    float noise = term(row[E], z);
    if (row[LN_VAR_MIN] != 0.0f || row[LN_VAR_MAX] != 0.0f) {
        float quarter = (row[LN_VAR_MAX] - row[LN_VAR_MIN]) * 0.25f;
        noise = noise * exponential(v * quarter + (quarter + row[LN_VAR_MIN] * 0.5f));
    }
    next = term(row[D], *x) + term(row[C], estimate);
    next = next + noise;
    next = next + term(row[F], *x0);
    next = next + term(row[G], out);
    *x = next + 0.0f;  // -0 becomes +0
    *x0 = estimate;
}

// Slots first … first + gridDim.y - 1. x, x0, given: (slots, size). prediction: (slots, outputs), v from `size` on.
// rows: (·, COLUMNS). embedding: (timesteps, width). temb: (slots, width). A partner is idle itself: the blocks of its
// guide read its prediction, and keep its x and temb as the guide's.
extern "C" __global__ void step(Slot *slots, int first, const float *rows, const float *embedding, float *x, float *x0,
                                float *temb, const float *prediction, const float *given, int size, int outputs, int width)
{
    const int index = first + blockIdx.y, thread = blockIdx.x * blockDim.x + threadIdx.x;
    const Slot slot = slots[index];
    __syncthreads();  // every thread has read its slot before the last block to arrive may move it on
    const int next = slot.row == 0 || slot.row + 1 == slot.end ? 0 : slot.row + 1;
    if (threadIdx.x == 0) {
        __threadfence();
        if (atomicAdd(&slots[index].arrived, 1u) == gridDim.x - 1) {
            __threadfence();
            slots[index].arrived = 0;
            slots[index].row = next;
        }
    }
    if (slot.row == 0)  // its image stays
        return;
    float row[COLUMNS];  // of the thread's own: x may not be the same memory, but the compiler cannot know
    for (int i = 0; i < COLUMNS; ++i)
        row[i] = rows[(long long)slot.row * COLUMNS + i];
    if (4 * thread < size) {
        float z[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (row[E] != 0.0f && !slot.given) {
            const int draw = (int)(row[T] + 1.0f), until = slot.share_until;
            const unsigned int own = until >= 0 && (draw == 0 || draw > until) ? 0u : ~0u;
            unsigned int words[4] = {(unsigned int)thread, (unsigned int)draw, slot.sample[0] & own, slot.sample[1] & own};
            philox4x32(words, slot.key[0], slot.key[1]);
            box_muller(words[0], words[1], z);
            box_muller(words[2], words[3], z + 2);
        }
        for (int i = 0; i < 4 && 4 * thread + i < size; ++i) {
            const long long at = 4 * thread + i, here = (long long)index * size + at;
            const float *out = prediction + (long long)index * outputs + at;
            float guided = *out;
            if (slot.partner >= 0) {
                const float without = prediction[(long long)slot.partner * outputs + at];
                guided = (guided - without) * slot.scale + without;
            }
            update(row, x + here, x0 + here, guided, outputs > size ? out[size] : 0.0f, slot.given ? given[here] : z[i]);
            if (slot.partner >= 0)
                x[(long long)slot.partner * size + at] = x[here];
            // An infinity of the prediction may be clipped away; where it is not read (x_T) it does not count.
            if (x[here] - x[here] != 0.0f || (row[B] != 0.0f && guided - guided != 0.0f))
                slots[index].broken = 1;  // by whichever threads: they write the same
        }
    }
    const float *seen = embedding + (long long)rows[(long long)next * COLUMNS + T] * width;
    for (int i = thread; i < width; i += gridDim.x * blockDim.x) {
        temb[(long long)index * width + i] = seen[i];
        if (slot.partner >= 0)
            temb[(long long)slot.partner * width + i] = seen[i];
    }
}
