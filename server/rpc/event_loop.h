// The tags of asynchronous operations, which a completion queue hands back when they have ended.

#ifndef SYNCBN_SERVER_RPC_EVENT_LOOP_H_
#define SYNCBN_SERVER_RPC_EVENT_LOOP_H_

namespace syncbn::rpc {

// The tag of an asynchronous operation.
class Tag {
 public:
  virtual ~Tag() = default;
  // The operation has ended; `ok` as grpc::CompletionQueue::Next has it. May delete the tag's owner.
  virtual void Proceed(bool ok) = 0;
};

// Calls a method of the operation's owner.
template <typename Owner>
class MethodTag final : public Tag {
 public:
  using Method = void (Owner::*)(bool ok);

  MethodTag(Owner* owner, Method method) : owner_(owner), method_(method) {}
  void Proceed(bool ok) override { (owner_->*method_)(ok); }

 private:
  Owner* const owner_;
  const Method method_;
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_EVENT_LOOP_H_
