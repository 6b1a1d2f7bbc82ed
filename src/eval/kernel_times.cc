#include "eval/kernel_times.h"

#include <algorithm>
#include <map>
#include <utility>

#include "eval/op_work.h"

namespace cambium {

KernelTimes::KernelTimes(Device device) : clock_(DeviceClock::on(device)) {}

void KernelTimes::begin(const OpCall& call) {
  calls_.push_back({call.kernel, work_of(call).shape, clock_->mark(call.stream), 0});
}

void KernelTimes::end(const OpCall& call) {
  calls_.back().end = clock_->mark(call.stream);
}

std::vector<KernelTimes::Line> KernelTimes::lines() const {
  std::map<std::pair<std::string, std::string>, Line> lines;
  for (const Call& call : calls_) {
    Line& line = lines[{call.kernel, call.shape}];
    line.kernel = call.kernel;
    line.shape = call.shape;
    ++line.calls;
    line.seconds += clock_->seconds(call.begin, call.end);
  }
  std::vector<Line> all;
  for (auto& [key, line] : lines) {
    all.push_back(std::move(line));
  }
  std::stable_sort(all.begin(), all.end(),
                   [](const Line& a, const Line& b) { return a.seconds > b.seconds; });
  return all;
}

}  // namespace cambium
