// Activations of single elements, as torch.nn.functional has them; what is NaN stays NaN.
//
// Included inside a namespace that has exp_, tanh_ and erf_ of every Real, once for the processor
// and once for the GPU: CONVGEN_ELEMENTWISE says what kind of functions they are.

template <class Real>
CONVGEN_ELEMENTWISE Real relu(Real x) {
  return x < Real(0) ? Real(0) : x;
}

template <class Real>
CONVGEN_ELEMENTWISE Real leaky_relu(Real x, Real slope) {
  return x > Real(0) ? x : x * slope;
}

template <class Real>
CONVGEN_ELEMENTWISE Real clamp(Real x, Real low, Real high) {
  const Real above = x < low ? low : x;
  return above > high ? high : above;
}

template <class Real>
CONVGEN_ELEMENTWISE Real sigmoid(Real x) {
  return Real(1) / (Real(1) + exp_(-x));
}

template <class Real>
CONVGEN_ELEMENTWISE Real silu(Real x) {
  return x / (Real(1) + exp_(-x));
}

template <class Real>
CONVGEN_ELEMENTWISE Real gelu(Real x) {
  return x * Real(0.5) * (Real(1) + erf_(x * Real(0.70710678118654752440)));
}

template <class Real>
CONVGEN_ELEMENTWISE Real gelu_tanh(Real x) {
  const Real inner = Real(0.79788456080286535588) * (x + Real(0.044715) * x * x * x);
  return Real(0.5) * x * (Real(1) + tanh_(inner));
}

template <class Real>
CONVGEN_ELEMENTWISE Real hardswish(Real x) {
  return x * (clamp(x + Real(3), Real(0), Real(6)) / Real(6));  // x itself from 3 on
}
