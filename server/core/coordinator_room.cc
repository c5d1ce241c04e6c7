// The groups of a master within its limits: which begin, and which end for others.

#include <algorithm>
#include <string>
#include <utility>

#include "server/core/coordinator.h"
#include "server/core/error.h"
#include "server/core/group.h"

namespace syncbn::core {
namespace {

// The parts of max_groups that one connection and one address may begin, so that none of them keeps others out.
constexpr size_t kPartOfConnection = 4;
constexpr size_t kPartOfAddress = 2;

}  // namespace

std::optional<Error> Coordinator::MakeRoom(const Join& join, absl::Time now, Effects& effects) {
  const auto room = [&](size_t groups, size_t most, const char* what, const char* limit, const std::string& connection,
                        const std::string& address) -> std::optional<Error> {
    if (groups < most) return std::nullopt;
    const auto abandoned = Abandoned(connection, address);
    if (abandoned == groups_.end()) return LimitError(groups + 1, what, limit, most);
    EndGroup(abandoned, AbandonedError(abandoned->first), now, effects);
    return std::nullopt;
  };
  const auto part = [&](size_t of) { return std::max<size_t>(limits_.max_groups / of, 1); };
  auto error = room(BegunBy(join.connection), part(kPartOfConnection), "groups that one connection has begun",
                    "max_groups_per_connection", join.connection, "");
  if (error.has_value()) return error;
  error = room(BegunBy(join.address), part(kPartOfAddress), "groups that one address has begun",
               "max_groups_per_address", "", join.address);
  if (error.has_value()) return error;
  return room(groups_.size(), limits_.max_groups, "groups", "max_groups", "", "");
}

size_t Coordinator::BegunBy(const std::string& name) const {
  const auto found = begun_by_.find(name);
  return found == begun_by_.end() ? 0 : found->second;
}

Coordinator::Groups::iterator Coordinator::Abandoned(const std::string& connection, const std::string& address) {
  auto oldest = groups_.end();
  for (auto slot = groups_.begin(); slot != groups_.end(); ++slot) {
    const Slot& of = slot->second;
    if (!of.group->empty() || (!connection.empty() && of.connection != connection)) continue;
    if (!address.empty() && of.address != address) continue;
    if (oldest == groups_.end() || of.group->linger_until() < oldest->second.group->linger_until()) oldest = slot;
  }
  return oldest;
}

Coordinator::Groups::iterator Coordinator::Begin(const Join& join, std::unique_ptr<Group> group) {
  for (const std::string* name : {&join.connection, &join.address}) {
    if (!name->empty()) ++begun_by_[*name];
  }
  return groups_
      .emplace(join.id, Slot{std::move(group), absl::InfiniteFuture(), /*retained=*/0, join.connection, join.address})
      .first;
}

void Coordinator::Erase(Groups::iterator slot) {
  for (const std::string* name : {&slot->second.connection, &slot->second.address}) {
    const auto found = begun_by_.find(*name);
    if (found != begun_by_.end() && --found->second == 0) begun_by_.erase(found);
  }
  groups_.erase(slot);
}

void Coordinator::EndGroup(Groups::iterator slot, const Error& why, absl::Time now, Effects& effects) {
  slot->second.group->End(why, now, effects);
  retained_ -= slot->second.retained;
  alarms_.erase({slot->second.alarm, slot->first});
  Erase(slot);
}

void Coordinator::LimitRetained(absl::Time now, Effects& effects) {
  while (retained_ > limits_.max_retained_bytes_of_all) {
    if (const auto abandoned = Abandoned(); abandoned != groups_.end()) {
      EndGroup(abandoned, AbandonedError(abandoned->first), now, effects);
      continue;
    }
    const auto greatest = std::max_element(groups_.begin(), groups_.end(), [](const auto& a, const auto& b) {
      return a.second.retained < b.second.retained;
    });
    // Records that are awaited are left, and the newest outcomes of each group.
    if (greatest->second.group->ForgetOldestOutcomes(retained_ - limits_.max_retained_bytes_of_all) == 0) return;
    Update(greatest);
  }
}

}  // namespace syncbn::core
