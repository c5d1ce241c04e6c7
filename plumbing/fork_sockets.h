// Sockets that belong to one process alone. A forked child holds every descriptor of its parent, and a connection ends
// for its peer only when the last holder has closed it: a child that lives on would keep a dead parent's connections
// alive, and its port taken.

#ifndef SYNCBN_PLUMBING_FORK_SOCKETS_H_
#define SYNCBN_PLUMBING_FORK_SOCKETS_H_

namespace syncbn {

// Gives the socket up in every child that this process forks from now on, before fork() returns there. Whoever closes
// the socket need not tell: a descriptor that has become something else by the time of the fork is left alone.
//
// In the child the number stays taken, by /dev/null: what the parent's objects still do with it there (reading,
// writing, closing once) fails or does nothing, instead of reaching a file that the child has opened since. Processes
// made by posix_spawn or vfork are not concerned; they rely on SOCK_CLOEXEC.
//
// Returns false, and does nothing, if `descriptor` is not a socket.
// Thread safety: any thread, at any time.
bool GiveUpInForkedChildren(int descriptor);

}  // namespace syncbn

#endif  // SYNCBN_PLUMBING_FORK_SOCKETS_H_
