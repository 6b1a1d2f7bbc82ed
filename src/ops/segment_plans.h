// What operations work out from the segments of a forward call and a few numbers of their own: made
// by the first layer that asks, kept for the others.
#pragma once

#include <memory>
#include <mutex>
#include <typeindex>
#include <vector>

namespace cambium {

/// Plans of work over one division into segments, by their type and key. A backend names its own
/// types; a Plan has a type Key that compares and a member `key`, and depends on the segments and
/// its key alone: not on the number of threads, the instruction set or what the state holds.
class SegmentPlans {
 public:
  /// The plan that has `key`; make() returns it where there is none yet (and does not ask for
  /// plans itself). Any thread may call.
  template <class Plan, class Make>
  std::shared_ptr<const Plan> get(const typename Plan::Key& key, const Make& make) {
    const std::lock_guard lock(mutex_);
    for (const Entry& entry : entries_) {
      if (entry.type == typeid(Plan)) {
        auto plan = std::static_pointer_cast<const Plan>(entry.plan);
        if (plan->key == key) {
          return plan;
        }
      }
    }
    auto made = std::make_shared<const Plan>(make());
    entries_.push_back({typeid(Plan), made});
    return made;
  }
  /// For other segments: forgets them all.
  void clear() {
    const std::lock_guard lock(mutex_);
    entries_.clear();
  }
  /// How many were made since.
  size_t size() const {
    const std::lock_guard lock(mutex_);
    return entries_.size();
  }

 private:
  struct Entry {
    std::type_index type;
    std::shared_ptr<const void> plan;
  };
  mutable std::mutex mutex_;
  std::vector<Entry> entries_;
};

/// The plan from `plans`, or one for this call where the caller keeps none.
template <class Plan, class Make>
std::shared_ptr<const Plan> plan_for(SegmentPlans* plans, const typename Plan::Key& key,
                                     const Make& make) {
  return plans == nullptr ? std::make_shared<const Plan>(make()) : plans->get<Plan>(key, make);
}

}  // namespace cambium
