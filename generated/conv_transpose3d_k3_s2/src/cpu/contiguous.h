// Calls of kernels that take contiguous tensors alone, where some are channels_last.
#pragma once

#include "layout.h"
#include "runtime.h"

namespace {

// Copies what is channels_last to the workspace, and the result from there.
template <class Problem>
class ContiguousCall {
  using Real = typename Problem::Real;
  using Storage = typename Problem::Storage;
  static constexpr int64_t TAPS =
      int64_t(Problem::AxisD::TAPS) * Problem::AxisH::TAPS * Problem::AxisW::TAPS;
  struct Operand {
    int bit;  // ConvgenOperand, 0 for what the call does not have
    void* ConvgenCall::* pointer;
    int64_t batch, channels, volume, at;
    bool is_written;
  };
  const ConvgenCall& given;
  ConvgenCall call;
  Operand operands[5];
  int64_t copied_bytes;
  int threads;

 public:
  // `result` is the ConvgenOperand that is written.
  ContiguousCall(const ConvgenCall& given_, int result) : given(given_), call(given_) {
    const auto volume = [](const int64_t* extent) { return extent[0] * extent[1] * extent[2]; };
    const Operand coarse = {CONVGEN_COARSE,          &ConvgenCall::coarse,       call.batch,
                            call.coarse_channels,    volume(call.coarse_extent), 0,
                            result == CONVGEN_COARSE};
    const Operand fine = {CONVGEN_FINE,          &ConvgenCall::fine,       call.batch,
                          call.fine_channels,    volume(call.fine_extent), 0,
                          result == CONVGEN_FINE};
    operands[0] = coarse;
    operands[1] = fine;
    operands[2] = {CONVGEN_WEIGHT,
                   &ConvgenCall::weight,
                   call.coarse_channels,
                   call.fine_channels / Problem::GROUPS,
                   TAPS,
                   0,
                   result == CONVGEN_WEIGHT};
    // What an epilogue reads and writes lies as the result does.
    operands[3] = operands[4] = result == CONVGEN_COARSE ? coarse : fine;
    operands[3].pointer = &ConvgenCall::residual;
    operands[3].is_written = false;
    operands[4].pointer = &ConvgenCall::preactivation;
    if (!(call.epilogue & CONVGEN_RESIDUAL)) operands[3].bit = 0;
    if (!(call.epilogue & CONVGEN_PREACTIVATION)) operands[4].bit = 0;
    Workspace workspace;
    double elements = 0;
    for (Operand& operand : operands)
      if (given.channels_last & operand.bit) {
        const int64_t count = operand.batch * operand.channels * operand.volume;
        operand.at = workspace.take(count * int64_t(sizeof(Storage)));
        elements += double(count);
      }
    copied_bytes = round_up(workspace.bytes, 256);
    threads = thread_count(call.device, elements);
    call.channels_last = 0;
  }

  // The call, whose workspace and tensors are valid in `run` alone.
  const ConvgenCall& contiguous() const { return call; }

  int64_t workspace_bytes(int64_t of_kernel) const { return copied_bytes + of_kernel; }

  // Calls run(call) with contiguous tensors.
  template <class Run>
  void run(Run run) {
    char* const workspace = static_cast<char*>(given.workspace);
    call.workspace = workspace + copied_bytes;
    for (const Operand& operand : operands)
      if (given.channels_last & operand.bit) {
        call.*operand.pointer = workspace + operand.at;
        if (!operand.is_written)
          transpose_all(call.*operand.pointer, given.*operand.pointer, operand.batch,
                        operand.volume, operand.channels);
      }
    run(call);
    for (const Operand& operand : operands)
      if (given.channels_last & operand.bit && operand.is_written)
        transpose_all(given.*operand.pointer, call.*operand.pointer, operand.batch,
                      operand.channels, operand.volume);
  }

 private:
  // (batch, rows, columns) to (batch, columns, rows).
  void transpose_all(void* to, const void* from, int64_t batch, int64_t rows,
                     int64_t columns) const {
    constexpr int64_t PIECE = 128;
    const int64_t pieces = ceil_div(rows, PIECE), others = ceil_div(columns, PIECE);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < batch * pieces * others; ++i) {
      const int64_t image = i / (pieces * others) * rows * columns;
      const int64_t row = i / others % pieces * PIECE, column = i % others * PIECE;
      transpose<Real>(static_cast<Storage*>(to) + image + column * rows + row, rows,
                      static_cast<const Storage*>(from) + image + row * columns + column, columns,
                      least(PIECE, rows - row), least(PIECE, columns - column));
    }
  }
};

}  // namespace
