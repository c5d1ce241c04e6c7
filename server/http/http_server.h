// Pages about a master for people, probes and Prometheus.

#ifndef SYNCBN_SERVER_HTTP_HTTP_SERVER_H_
#define SYNCBN_SERVER_HTTP_HTTP_SERVER_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "grpcpp/channel.h"

namespace syncbn::http {

struct HttpOptions {
  // HOST:PORT; port 0 takes a free one.
  std::string address;
  // The token that readers of everything but probes and metrics must bear: as "Authorization: Bearer TOKEN", or as the
  // password that a browser asks for. Empty: nothing.
  std::string token;
  // False: nothing but probes and metrics is served.
  bool pages_open = true;
  // Groups of more workers have no metrics by rank.
  uint32_t metrics_max_ranks = 256;
};

// Serves, by GET, and the pages only to those that the options admit:
//
//   /           a page that shows groups, members, rounds and layers, and follows them
//   /metrics    Prometheus's text format
//   /livez      200 unless the master's loop has stopped answering
//   /readyz     200 while workers can connect; 503 with the reason otherwise. /healthz is the same
//   /statusz    text for a terminal
//   /api/...    the answers of InspectionService as JSON: master, groups, group, layers, layer
//
// Answers come from the master by `channel`, so a request costs the master what a call of InspectionService costs. Four
// requests are answered at a time, and a probe beside them. Requests have no bodies, each must arrive within five
// seconds, and its answer must be read within thirty; a connection serves one of them. At most 256 connections are
// open, fewer where the limit of descriptors is below 4,096: a further one takes the place of the oldest one of the
// address that has most. A forked child holds neither the listening socket nor the connections, and may destroy the
// object, which does nothing there.
//
// Thread safety: all methods may be called from any thread.
class HttpServer {
 public:
  // Returns: the server, which serves already.
  // Errors: INVALID_ARGUMENT (an address that is no HOST:PORT, or that does not exist; a token that is none),
  // UNAVAILABLE (the address cannot be bound, with the reason), RESOURCE_EXHAUSTED (no thread can be had),
  // FAILED_PRECONDITION (FORKED).
  static absl::StatusOr<std::unique_ptr<HttpServer>> Start(const HttpOptions& options,
                                                           std::shared_ptr<grpc::Channel> channel);

  // Ends the requests that are being served.
  ~HttpServer();
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;

  // Returns: the address with the actual port, as "127.0.0.1:8080".
  std::string address() const;

 private:
  class Impl;
  explicit HttpServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace syncbn::http

#endif  // SYNCBN_SERVER_HTTP_HTTP_SERVER_H_
