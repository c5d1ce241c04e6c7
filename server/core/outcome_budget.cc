#include "server/core/outcome_budget.h"

#include <iterator>

#include "plumbing/check.h"
#include "server/core/layer.h"

namespace syncbn::core {

OutcomeBudget::Handle OutcomeBudget::Charge(Entry entry) {
  SYNCBN_CHECK(entry.layer != nullptr && entry.round != nullptr);
  SYNCBN_CHECK((entry.round->outcome == nullptr) == entry.forgotten);
  record_bytes_ += entry.record_bytes;
  if (entry.forgotten) {
    forgotten_.push_back(entry);
    return std::prev(forgotten_.end());
  }
  remembered_.push_back(entry);
  bytes_ += entry.bytes;
  while (bytes_ > max_bytes_ && remembered_.size() > min_outcomes_) {
    Forget(remembered_.begin());
    forgot_for_others_ = false;
  }
  return std::prev(remembered_.end());
}

size_t OutcomeBudget::ForgetOldest(size_t bytes) {
  const size_t before = bytes_;
  while (before - bytes_ < bytes && remembered_.size() > min_outcomes_) {
    Forget(remembered_.begin());
    forgot_for_others_ = true;
  }
  return before - bytes_;
}

void OutcomeBudget::Forget(Handle oldest) {
  oldest->round->outcome.reset();
  oldest->forgotten = true;
  bytes_ -= oldest->bytes;
  forgotten_.splice(forgotten_.end(), remembered_, oldest);
}

void OutcomeBudget::Refund(Handle handle) {
  SYNCBN_CHECK(record_bytes_ >= handle->record_bytes, record_bytes_, " < ", handle->record_bytes);
  record_bytes_ -= handle->record_bytes;
  if (handle->forgotten) {
    forgotten_.erase(handle);
    return;
  }
  SYNCBN_CHECK(bytes_ >= handle->bytes, bytes_, " < ", handle->bytes);
  bytes_ -= handle->bytes;
  remembered_.erase(handle);
}

void OutcomeBudget::Trim() {
  while (record_bytes_ > max_record_bytes_ && !forgotten_.empty()) {
    const size_t before = forgotten_.size();
    const Entry oldest = forgotten_.front();
    oldest.layer->Drop(oldest.phase, oldest.sequence);
    SYNCBN_CHECK(forgotten_.size() < before, "dropping sequence ", oldest.sequence, " freed nothing");
  }
}

void OutcomeBudget::CheckInvariants(size_t records) const {
  SYNCBN_CHECK(remembered_.size() + forgotten_.size() == records, remembered_.size(), " and ", forgotten_.size(),
               ", not ", records);
  size_t bytes = 0, record_bytes = 0;
  for (const std::list<Entry>* list : {&remembered_, &forgotten_}) {
    for (const Entry& entry : *list) {
      SYNCBN_CHECK(entry.forgotten == (list == &forgotten_), "sequence ", entry.sequence);
      SYNCBN_CHECK((entry.round->outcome == nullptr) == entry.forgotten, "sequence ", entry.sequence);
      if (!entry.forgotten) bytes += entry.bytes;
      record_bytes += entry.record_bytes;
    }
  }
  SYNCBN_CHECK(bytes_ == bytes, bytes_, ", not ", bytes);
  SYNCBN_CHECK(record_bytes_ == record_bytes, record_bytes_, ", not ", record_bytes);
  SYNCBN_CHECK(bytes_ <= max_bytes_ || remembered_.size() <= min_outcomes_, bytes_, " bytes");
}

}  // namespace syncbn::core
