// Sockets that belong to one process alone. A forked child inherits every descriptor of its parent, and a connection
// ends for its peer only after the last process has closed it: a child that lives on would keep a dead parent's
// connections and port.

#ifndef SYNCBN_PLUMBING_FORK_SOCKETS_H_
#define SYNCBN_PLUMBING_FORK_SOCKETS_H_

namespace syncbn {

// Closes the socket in every child that this process forks from now on, before fork() returns there. Closing the socket
// in this process needs no notice: a descriptor that is another file at the time of the fork is left alone.
//
// In the child, /dev/null takes the descriptor's place, so that the parent's objects can neither read, write nor close
// a file that the child has opened since. Processes made by posix_spawn or vfork rely on SOCK_CLOEXEC instead.
//
// Returns false, and does nothing, if `descriptor` is not a socket.
// Thread safety: any thread may call it at any time.
bool GiveUpInForkedChildren(int descriptor);

}  // namespace syncbn

#endif  // SYNCBN_PLUMBING_FORK_SOCKETS_H_
