#include "ops/recurrence/recurrence_pieces.h"

#include <set>

#include "ops/cuda_shapes_testing.h"
#include "ops/recurrence/recurrence_testing.h"

namespace cambium {
namespace {

using namespace testing;  // NOLINT(google-build-using-namespace)

// Of a device with 132 multiprocessors that hold a block each, and of heads of 128 x 128 walked 32
// columns at a time.
constexpr int64_t kResident = 132;
constexpr int64_t kFirst = 4;
constexpr int64_t kLater = 8;

TEST(RecurrencePieces, AsManyAsTheDeviceHasRoomFor) {
  struct Row {
    std::vector<int64_t> chunks;
    int64_t heads, resident, most;
  };
  for (const Row& row : std::vector<Row>{
           {{}, 8, kResident, 1},
           {{1}, 1, kResident, 1},
           {{63}, 1, kResident, 1},
           {{64}, 1, kResident, 1},
           {{95}, 1, kResident, 1},
           {{96}, 1, kResident, 3},
           {{128}, 1, kResident, 4},
           {{16384}, 1, kResident, 4},
           {{128}, 4, kResident, 4},            // 112 blocks of 115
           {{128}, 5, kResident, 3},            // 140, then 100
           {{128}, 6, kResident, 1},            // 168, then 120: two are not worth it
           {{128}, 32, kResident, 1},           //
           {{128, 128}, 2, kResident, 4},       // 112, as one of 4 heads
           {{128, 128}, 4, kResident, 1},       // 224, then 160
           {{128, 128, 128}, 2, kResident, 1},  // 168, then 120
           {{128, 63}, 4, kResident, 3},        // 128, then 96
           {{128, 1}, 5, kResident, 1},         // 160, then 120
           {{128}, 4, 90, 1},                   // 112 of 78, then 80
           {{128}, 2, 54, 3},                   // 56 of 47, then 40
       }) {
    SCOPED_TRACE(::testing::PrintToString(row.chunks) + " chunks, heads " +
                 std::to_string(row.heads));
    EXPECT_EQ(most_pieces(row.chunks, {row.heads, kFirst, kLater, row.resident}), row.most);
  }
}

TEST(RecurrencePieces, HaveEveryChunkOnceAndAreLongEnough) {
  for (int64_t chunks = 1; chunks < 8 * kLeastPiece; ++chunks) {
    for (int64_t most = 1; most <= kMostPieces; ++most) {
      const int64_t pieces = pieces_of(chunks, most);
      EXPECT_EQ(piece_begin(chunks, pieces, 0), 0);
      EXPECT_EQ(piece_begin(chunks, pieces, pieces), chunks);
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t begin = piece_begin(chunks, pieces, piece);
        const int64_t end = piece_begin(chunks, pieces, piece + 1);
        EXPECT_TRUE(pieces == 1 || end - begin >= kLeastPiece) << chunks << " in " << pieces;
        EXPECT_EQ(piece_at(chunks, pieces, begin), piece);
        EXPECT_EQ(piece_at(chunks, pieces, end - 1), piece);
      }
    }
  }
}

// Sequences one behind another, of every length that has pieces and of some that have none.
TEST(RecurrencePieces, EveryLaterPieceHasAPlaceOfItsOwn) {
  std::set<int64_t> places;
  int64_t first = 0;
  for (int64_t chunks = 2 * kLeastPiece - 2; chunks < 5 * kLeastPiece; ++chunks) {
    const int64_t pieces = pieces_of(chunks, kMostPieces);
    for (int64_t piece = 1; piece < pieces; ++piece) {
      EXPECT_TRUE(places.insert(piece_place(first + piece_begin(chunks, pieces, piece))).second);
    }
    first += chunks + chunks % 3;
  }
}

// --- On a GPU: Gated DeltaNet, in bf16 in pieces, where it has room for them.

constexpr int64_t kPiece = kLeastPiece * kRecurrenceChunk;  // tokens

struct PiecesCase {
  const char* name;
  Heads heads;
  std::vector<int64_t> lengths;
};

std::ostream& operator<<(std::ostream& out, const PiecesCase& c) {
  return out << c.name;
}

class CudaRecurrencePieces : public CudaShapes, public ::testing::WithParamInterface<PiecesCase> {};

// From new sequences and from states in the middle of a chunk.
TEST_P(CudaRecurrencePieces, MatchTheCpuAndGiveTheSameBitsTwice) {
  const std::vector<int64_t>& lengths = GetParam().lengths;
  const StatefulCase test = gated_delta_net(sum(lengths), GetParam().heads);
  expect_state_matches_cpu(test, lengths);
  const OwnedSegments segments = packed_segments(lengths);
  const Operation operation = [&](Context& ctx, const In& in) {
    return test.operation(ctx, in, segments.view(), {});
  };
  expect_cuda_matches_cpu(operation, test.inputs, false);
  const auto values = draw_as(Dtype::kBF16, test.inputs);
  const testing::Run one = run_on_cuda(operation, test.inputs, values, Dtype::kBF16, false);
  const testing::Run two = run_on_cuda(operation, test.inputs, values, Dtype::kBF16, false);
  EXPECT_EQ(one.output, two.output);
}

INSTANTIATE_TEST_SUITE_P(
    Lengths, CudaRecurrencePieces,
    ::testing::Values(PiecesCase{"around_two_and_three_pieces",
                                 {1, 2, 64, 64},
                                 {2 * kPiece - 1, 2 * kPiece, 2 * kPiece + 1, 3 * kPiece + 1, 1,
                                  40}},
                      PiecesCase{"four_pieces", {1, 1, 128, 128}, {4 * kPiece}},
                      PiecesCase{"four_pieces_but_a_token", {1, 1, 128, 128}, {0, 4 * kPiece - 1}},
                      PiecesCase{"shared_keys", {2, 4, 128, 128}, {3 * kPiece + 90}},
                      PiecesCase{"narrow_values", {1, 3, 128, 64}, {2 * kPiece + 65, 3 * kPiece}},
                      PiecesCase{"wide_values", {1, 2, 64, 128}, {3 * kPiece + 700}},
                      PiecesCase{"beside_single_tokens",
                                 {1, 2, 128, 128},
                                 {1, 1, 3 * kPiece + 5, 1, 0, 31, 1, 64, 1, 1}}),
    ::testing::PrintToStringParamName());

// A prompt in calls that end anywhere, then token by token.
TEST_F(CudaShapes, RecurrencePiecesAgreeWithAnySplit) {
  const int64_t tokens = 3 * kPiece + 70;
  std::vector<std::vector<int64_t>> cuts{
      {}, {1}, {64}, {70}, {kPiece}, {3 * kPiece - 1}, {3 * kPiece}, {3 * kPiece + 63}};
  cuts.emplace_back();
  for (int64_t t = tokens - 9; t < tokens; ++t) {
    cuts.back().push_back(t);
  }
  expect_splits_agree_on_cuda(gated_delta_net(tokens, {1, 2, 64, 64}), cuts);
}

// Nothing decays and little is written: all that is handed on is what came.
TEST_F(CudaShapes, RecurrencePiecesKeepAStateThatDoesNotDecay) {
  StatefulCase test = gated_delta_net(4 * kPiece, {1, 1, 128, 128});
  test.inputs[3].lo = -1e-6;
  test.inputs[4].hi = 2e-3;
  const auto values = draw_as(Dtype::kBF16, test.inputs);
  const OwnedSegments segments{{0, static_cast<int32_t>(test.tokens)}, {128}, {0}};
  Input state{test.state_row, -1.0, 1.0};
  state.shape.insert(state.shape.begin(), 1);
  const auto before = draw({state}, 3)[0];
  const StateRun exact = run_with_state(test, values, segments, before, {}, Dtype::kF32);
  const StateRun run = run_with_state(test, values, segments, before, Device::kCuda, Dtype::kBF16);
  EXPECT_LE(norm_error(run.output, exact.output), kNarrowForward);
  // A state handed on in bf16 alone misses 1.5e-3.
  EXPECT_LE(norm_error(run.state, exact.state), 1e-4);
}

// Where results must not depend on what else is in the call, nothing is in pieces.
TEST_F(CudaShapes, RecurrencePiecesDoNotShowInABatchInvariantCall) {
  const int64_t length = 3 * kPiece + 5;
  const std::vector<int64_t> lengths{length, 300, 4 * kPiece};
  const Heads heads{1, 4, 128, 128};
  const StatefulCase all = gated_delta_net(sum(lengths), heads);
  const StatefulCase one = gated_delta_net(length, heads);
  const auto values = draw_as(Dtype::kBF16, all.inputs);
  std::vector<std::vector<double>> own;
  for (const auto& input : values) {
    own.emplace_back(input.begin(),
                     input.begin() + static_cast<int64_t>(input.size()) / all.tokens * length);
  }
  OwnedSegments together = packed_segments(lengths);
  together.slot = {0, 1, 2};
  const OwnedSegments alone{{0, static_cast<int32_t>(length)}, {0}, {0}};
  const int64_t state = heads.heads * heads.key_dim * heads.dim;
  const auto run = [&](const StatefulCase& test, const std::vector<std::vector<double>>& inputs,
                       const OwnedSegments& segments, int64_t slots) {
    const std::vector<double> before(static_cast<size_t>(slots * state));
    StateRun result =
        run_with_state(test, inputs, segments, before, Device::kCuda, Dtype::kBF16, true);
    result.output.resize(static_cast<size_t>(length * heads.heads * heads.dim));
    result.state.resize(static_cast<size_t>(state));
    return result;
  };
  const StateRun beside = run(all, values, together, 3);
  const StateRun by_itself = run(one, own, alone, 1);
  EXPECT_EQ(beside.output, by_itself.output);
  EXPECT_EQ(beside.state, by_itself.state);
}

// Sequences one behind another, a call each, whose memory the one before had: what kernels tell
// each other must be of the call. Three heads share keys, of few enough that chunks are prepared
// beside the walk.
TEST_F(CudaShapes, RecurrenceCallsFindNothingOfThoseBefore) {
  const std::vector<int64_t> lengths{1500, 1500, 40, 2000, 64, 700, 700, 65, 1500};
  const Heads heads{2, 6, 128, 128};
  const StatefulCase test = gated_delta_net(sum(lengths), heads);
  const auto values = draw_as(Dtype::kBF16, test.inputs);
  const OwnedSegments packed = packed_segments(lengths);
  const Operation together = [&](Context& ctx, const In& in) {
    return test.operation(ctx, in, packed.view(), {});
  };
  const testing::Run exact =
      run_operation<float>(together, test.inputs, values, false, false, true);
  const auto in_turn = [&] {
    const ArenaScope scope(cuda_arena());
    const ArenaScope host_scope(cuda_host_arena());
    poison_cuda();
    Context ctx{.arena = &cuda_arena(), .host = &cuda_host_arena(), .activations = Dtype::kBF16};
    std::vector<OwnedTensor> owned;
    for (size_t i = 0; i < values.size(); ++i) {
      owned.push_back(
          cuda_tensor(test.inputs[i].dtype(Dtype::kBF16), test.inputs[i].shape, values[i]));
    }
    std::vector<double> output;
    for (size_t s = 0; s < lengths.size(); ++s) {
      const ArenaScope call(cuda_arena());
      const ArenaScope host_call(cuda_host_arena());
      In tensors;
      for (const OwnedTensor& x : owned) {
        tensors.push_back(x.view.slice(0, packed.start[s], lengths[s]));
      }
      const std::vector<double> y =
          take(test.operation(ctx, tensors, packed_segments({lengths[s]}).view(), {}));
      output.insert(output.end(), y.begin(), y.end());
    }
    return output;
  };
  const std::vector<double> one = in_turn();
  EXPECT_LE(norm_error(one, exact.output), kNarrowForward);
  EXPECT_EQ(one, in_turn());
}

}  // namespace
}  // namespace cambium
