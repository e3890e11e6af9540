// The passes of pooled_norm.py over maps in channels-last memory, (b, h, w, c); the PyTorch operations there are the
// reference. A thread takes whole images, each with sums of its own, so that the numbers do not depend on the number of
// threads. NaN stays NaN, as nothing is compiled with -ffast-math.

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using bf16 = uint16_t;

inline float load(const float* p) { return *p; }

inline float load(const bf16* p) {
    const uint32_t bits = uint32_t(*p) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline void store(float* p, float value) { *p = value; }

inline void store(bf16* p, float value) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    *p = value != value ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

constexpr uint8_t NONE = 4;  // the index where ReLU is 0: no place of the 2x2 gets a gradient

struct Maps {  // the first argument of every function
    int64_t half, threads, b, h, w, c;
    long places() const { return (h / 2) * (w / 2); }
};

// 2x2 maxima of x (minima where sign is -1), their places 0 to 3, and the sums of x and of its squares (2, c).
template <class T>
void pool_image(long h, long w, long c, const T* x, const float* sign, T* __restrict pooled, uint8_t* __restrict index,
                double* sums) {
    // Of two rows single precision sums what is beyond their first value: where the mean is large, the squares of the
    // values themselves would lose the variance.
    std::vector<float> work(3 * c);
    float *__restrict first = work.data(), *__restrict sum = first + c, *__restrict square = sum + c;
    for (long row = 0; row < h; row += 2, x += 2 * w * c) {
        const bool two = row + 1 < h;
        for (long i = 0; i < c; i++) first[i] = load(x + i), sum[i] = square[i] = 0;
        for (long column = 0; two && column < w / 2; column++, pooled += c, index += c) {
            const T *p = x + 2 * column * c, *q = p + w * c;
#pragma omp simd
            for (long i = 0; i < c; i++) {
                const float v[4] = {load(p + i), load(p + c + i), load(q + i), load(q + c + i)};
                const float d[4] = {v[0] - first[i], v[1] - first[i], v[2] - first[i], v[3] - first[i]};
                sum[i] += (d[0] + d[1]) + (d[2] + d[3]);
                square[i] += (d[0] * d[0] + d[1] * d[1]) + (d[2] * d[2] + d[3] * d[3]);
                float best = v[0] * sign[i];
                int at = 0;
                for (int k = 1; k < 4; k++) {  // of equal ones the first counts, as in max_pool2d
                    const float other = v[k] * sign[i];
                    at = other > best ? k : at;
                    best = other > best ? other : best;
                }
                store(pooled + i, best * sign[i]);
                index[i] = at;
            }
        }
        // The last column and row of odd sides count in the statistics and are not pooled.
        for (long line = 0; line < (two ? 2 : 1); line++) {
            for (long column = two ? w / 2 * 2 : 0; column < w; column++) {
                for (long i = 0; i < c; i++) {
                    const float d = load(x + (line * w + column) * c + i) - first[i];
                    sum[i] += d, square[i] += d * d;
                }
            }
        }
        const double n = two ? 2 * w : w;
        for (long i = 0; i < c; i++) {
            const double from = first[i], s = sum[i];
            sums[i] += s + n * from;
            sums[c + i] += square[i] + 2 * from * s + n * from * from;
        }
    }
}

// y = relu((pooled - mean) * scale + bias), and NONE as the index where it is 0.
template <class T>
void normalise_image(long places, long c, const T* pooled, const float* mean, const float* scale, const float* bias,
                     T* __restrict y, uint8_t* __restrict index) {
    for (; places > 0; places--, pooled += c, y += c, index += c) {
#pragma omp simd
        for (long i = 0; i < c; i++) {
            const float value = (load(pooled + i) - mean[i]) * scale[i] + bias[i];
            store(y + i, value <= 0 ? 0 : value);
            index[i] = value <= 0 ? NONE : index[i];
        }
    }
}

// The sums (2, c) of the gradient where ReLU lets it pass, and of its product with pooled - mean.
template <class T>
void sum_image(long places, long w, long c, const T* gradient, const T* pooled, const uint8_t* index, const float* mean,
               double* sums) {
    std::vector<float> row(2 * c);  // a row in single precision, rows in double
    float *__restrict of_bias = row.data(), *__restrict of_weight = of_bias + c;
    for (long place = 1; place <= places; place++, gradient += c, pooled += c, index += c) {
#pragma omp simd
        for (long i = 0; i < c; i++) {
            const float passed = index[i] == NONE ? 0 : load(gradient + i);
            of_bias[i] += passed, of_weight[i] += passed * (load(pooled + i) - mean[i]);
        }
        if (place % w) continue;
        for (long i = 0; i < c; i++) {
            sums[i] += of_bias[i], sums[c + i] += of_weight[i];
            of_bias[i] = of_weight[i] = 0;
        }
    }
}

// Over x: x * slope + offset, and gradient * scale more where the pooling took x.
template <class T>
void spread_image(long h, long w, long c, T* __restrict x, const T* gradient, const uint8_t* index, const float* scale,
                  const float* slope, const float* offset) {
    for (long row = 0; row < h; row++) {
        for (long column = 0; column < w; column++, x += c) {
            const bool pooled = row < h / 2 * 2 && column < w / 2 * 2;
            const int taken = pooled ? row % 2 * 2 + column % 2 : -1;
            const long at = pooled ? (row / 2 * (w / 2) + column / 2) * c : 0;
            const T* g = gradient + at;
            const uint8_t* k = index + at;
#pragma omp simd
            for (long i = 0; i < c; i++) {
                const float more = k[i] == taken ? load(g + i) * scale[i] : 0;
                store(x + i, load(x + i) * slope[i] + offset[i] + more);
            }
        }
    }
}

template <class F>
void each_image(const Maps& m, F f) {  // f(a value of the maps' type, the image's beginning in x, pooled and sums)
#pragma omp parallel for num_threads(m.threads) schedule(static)
    for (long i = 0; i < m.b; i++) {
        const long x = i * m.h * m.w * m.c, pooled = i * m.places() * m.c, sums = i * 2 * m.c;
        m.half ? f(bf16(), x, pooled, sums) : f(float(), x, pooled, sums);
    }
}

}  // namespace

// What a function fills stands last, or is x. The maps are (b, h, w, c) of T, the sums (b, 2, c).
extern "C" void pool(const Maps& m, const void* x, const float* sign, void* pooled, uint8_t* index, double* sums) {
    each_image(m, [=](auto t, long i, long j, long k) {
        using T = decltype(t);
        pool_image(m.h, m.w, m.c, (const T*)x + i, sign, (T*)pooled + j, index + j, sums + k);
    });
}

extern "C" void normalise(const Maps& m, const void* pooled, const float* mean, const float* scale, const float* bias,
                          void* y, uint8_t* index) {
    each_image(m, [=](auto t, long, long j, long) {
        using T = decltype(t);
        normalise_image(m.places(), m.c, (const T*)pooled + j, mean, scale, bias, (T*)y + j, index + j);
    });
}

extern "C" void sum(const Maps& m, const void* gradient, const void* pooled, const uint8_t* index, const float* mean,
                    double* sums) {
    each_image(m, [=](auto t, long, long j, long k) {
        using T = decltype(t);
        sum_image(m.places(), m.w / 2, m.c, (const T*)gradient + j, (const T*)pooled + j, index + j, mean, sums + k);
    });
}

extern "C" void spread(const Maps& m, void* x, const void* gradient, const uint8_t* index, const float* scale,
                       const float* slope, const float* offset) {
    each_image(m, [=](auto t, long i, long j, long) {
        using T = decltype(t);
        spread_image(m.h, m.w, m.c, (T*)x + i, (const T*)gradient + j, index + j, scale, slope, offset);
    });
}
