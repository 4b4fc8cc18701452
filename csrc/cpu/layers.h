// Constants of layers.inc.
#pragma once

#include "masked_conv.h"
#include "vector.h"

namespace infovae_fast {

constexpr int kStrip = 6;  // rows whose sums are in registers at once

// e^r - 1 = r sum c_i r^i for |r| <= ln(2) / 2: relative error 1.1e-8 (float) and 2.4e-19 (double).
template <typename T>
struct Expm1;
template <>
struct Expm1<float> {
    static constexpr float log2e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
    static constexpr float most = 80, most_a = 20, most_b = 60;  // e^most and e^(most_a + most_b) do not overflow
    static constexpr int degree = 5;
    static constexpr float c[] = {1.0f,
                                  0.49999998124795182f,
                                  0.16666506219567093f,
                                  0.041667136210852982f,
                                  0.0083690685627894121f,
                                  0.0013888872635554964f};
};
template <>
struct Expm1<double> {
    static constexpr double log2e = 1.4426950408889634074, ln2_high = 0.693147180369123816490,
                            ln2_low = 1.90821492927058770002e-10;
    static constexpr double most = 700, most_a = 44, most_b = 600;
    static constexpr int degree = 11;
    static constexpr double c[] = {1.0,
                                   0.5,
                                   0.16666666666666680657,
                                   0.041666666666666492456,
                                   0.0083333333333197000573,
                                   0.0013888888888965132584,
                                   0.00019841269889815124528,
                                   0.000024801587172496682387,
                                   2.7557241139432478189e-6,
                                   2.7557399888465052079e-7,
                                   2.5109964026544849121e-8,
                                   2.087675138676410372e-9};
};

}  // namespace infovae_fast
