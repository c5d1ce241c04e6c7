// The way of frames between a worker and its master.

#ifndef SYNCBN_CLIENT_CC_TRANSPORT_H_
#define SYNCBN_CLIENT_CC_TRANSPORT_H_

#include <string>

#include "absl/functional/function_ref.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "client/cc/buffer.h"
#include "client/cc/session/attempts.h"

namespace syncbn {

// Carries one stream at a time: frames of bytes, in order, either way. Nothing here knows what is in a frame.
//
// *Thread safety*: the caller's lock is held in every call but Wait, which one thread at a time makes without it.
class Transport {
 public:
  struct Event {
    enum class Kind {
      kUp,       // The stream can be written to and read from.
      kFrame,    // A frame has been read.
      kWritten,  // The frame of the last Write has been written, unless Write has said so.
      kBroken,   // The stream has ended, or could not be opened. Its last event.
    };
    Kind kind;
    absl::Span<const absl::string_view> frame = {};  // kFrame: its bytes, in order.
    session::Break why = {};                         // kBroken.
  };

  virtual ~Transport() = default;

  // Opens a stream, which ends the one before: no event of that one comes any more. `connect_timeout` is for one
  // address.
  virtual void Open(const std::string& target, absl::Duration connect_timeout) = 0;
  // Breaks the stream off. kBroken follows.
  virtual void Close() = 0;
  // Returns false before kUp, and as soon as the stream has failed, which is before kBroken tells why.
  virtual bool IsUp() const = 0;
  // Returns whether frames go through memory that the master shares, at this moment.
  virtual bool shares_memory() const { return false; }
  // Writes a frame, whose bytes are those of all parts in order. Returns whether it has been written; if not, kWritten
  // follows. One write at a time; only while IsUp().
  virtual bool Write(absl::Span<const Buffer> parts) = 0;
  // Asks for the next frame. Has no effect while one is being asked for, or unless IsUp().
  virtual void Read() = 0;

  // Blocks until something has happened, `deadline` (a time of clock.h) or a Wake.
  virtual void Wait(absl::Time deadline) = 0;
  // Calls `handle` with the event that the last Wait found, if there is one. The event and its frame live as long as
  // the call. For the thread that waited.
  virtual void Take(absl::FunctionRef<void(const Event&)> handle) = 0;
  // Ends the Wait under way, or the next one.
  virtual void Wake() = 0;
};

}  // namespace syncbn

#endif  // SYNCBN_CLIENT_CC_TRANSPORT_H_
