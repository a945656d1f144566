// Operands of a wgrad that are packed first: channels side by side, a multiple of 16 bytes of them.
#ifndef CONVGEN_IMPLICIT_GEMM_WGRAD_PACKS_CUH
#define CONVGEN_IMPLICIT_GEMM_WGRAD_PACKS_CUH

#include "turned.cuh"

namespace convgen {

// Which of both, and where: in the workspace, coarse first, before anything else. Of several groups
// each has a multiple of 16 bytes as it is.
template <typename T, int GROUPS>
class WgradPacks {
 public:
  // `reads_patches`: fine is packed already. `takes_lines`: contiguous tensors stay as they lie.
  WgradPacks(const ConvgenCall& call, bool reads_patches, bool takes_lines, int multiprocessors)
      : multiprocessors_(multiprocessors) {
    const bool fits = GROUPS == 1 || (call.coarse_channels / GROUPS % VECTOR == 0 &&
                                      call.fine_channels / GROUPS % VECTOR == 0);
    const auto lies = [&](int operand, int64_t channels) {
      return !fits || (call.channels_last & operand ? channels % VECTOR == 0 : takes_lines);
    };
    coarse_ = elements(!lies(CONVGEN_COARSE, call.coarse_channels), call.batch,
                       call.coarse_channels, call.coarse_extent);
    fine_ = elements(!reads_patches && !lies(CONVGEN_FINE, call.fine_channels), call.batch,
                     call.fine_channels, call.fine_extent);
    pads_fine_ = reads_patches || fine_ > 0;
  }

  bool any() const { return coarse_ + fine_ > 0; }
  int64_t bytes() const { return bytes_of(coarse_) + bytes_of(fine_); }
  double clocks() const {
    return (coarse_ > 0 ? pack_clocks<T>(coarse_, multiprocessors_) : 0) +
           (fine_ > 0 ? pack_clocks<T>(fine_, multiprocessors_) : 0);
  }

  // The call with both as they lie when run() has packed them, behind the packs' workspace.
  ConvgenCall packed(ConvgenCall call) const {
    unsigned char* const workspace = static_cast<unsigned char*>(call.workspace);
    if (coarse_ > 0) {
      call.coarse = workspace, call.channels_last |= CONVGEN_COARSE;
      call.coarse_channels = round_up(call.coarse_channels, VECTOR);
    }
    if (fine_ > 0) {
      call.fine = workspace + bytes_of(coarse_), call.channels_last |= CONVGEN_FINE;
    }
    if (pads_fine_) call.fine_channels = round_up(call.fine_channels, VECTOR);
    call.workspace = workspace + bytes();
    return call;
  }

  int run(const ConvgenCall& call) const {
    unsigned char* const workspace = static_cast<unsigned char*>(call.workspace);
    if (coarse_ > 0) {
      if (const int error = pack(call, CONVGEN_COARSE, call.coarse, workspace, call.coarse_channels,
                                 call.coarse_extent)) {
        return error;
      }
    }
    return fine_ > 0 ? pack(call, CONVGEN_FINE, call.fine, workspace + bytes_of(coarse_),
                            call.fine_channels, call.fine_extent)
                     : CONVGEN_OK;
  }

 private:
  static constexpr int VECTOR = VECTOR_BYTES / sizeof(T);

  static int64_t elements(bool packs, int64_t batch, int64_t channels, const int64_t (&e)[3]) {
    return packs ? batch * e[0] * e[1] * e[2] * round_up(channels, VECTOR) : 0;
  }
  static int64_t bytes_of(int64_t elements) {
    return round_up(elements * static_cast<int64_t>(sizeof(T)), 1024);
  }
  int pack(const ConvgenCall& call, int operand, const void* from, void* to, int64_t channels,
           const int64_t (&extent)[3]) const {
    const bool last = (call.channels_last & operand) != 0;
    const PackShape s =
        pack_shape(call.batch, channels, extent, 1, round_up(channels, VECTOR), last);
    return pack_input<Form::ROUNDED>(static_cast<const T*>(from), static_cast<T*>(to), s, last,
                                     static_cast<int>(call.device), call.stream, multiprocessors_);
  }

  int64_t coarse_, fine_;  // elements, of what is packed
  bool pads_fine_;
  int multiprocessors_;
};

}  // namespace convgen

#endif  // CONVGEN_IMPLICIT_GEMM_WGRAD_PACKS_CUH
