// Where a master listens, to whom it speaks, and what it refuses.

#include <stdlib.h>

#include <fstream>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "grpcpp/security/credentials.h"
#include "gtest/gtest.h"
#include "server/stats_server.h"
#include "tests/server/rpc/raw_stream.h"

namespace syncbn::testing {
namespace {

using ::testing::HasSubstr;

absl::StatusOr<std::unique_ptr<MasterServer>> Start(std::vector<std::string> addresses) {
  MasterServer::Options options;
  options.addresses = std::move(addresses);
  return MasterServer::Start(std::move(options));
}

// A short path: those of unix sockets end at 107 bytes.
std::string SocketFolder() {
  static const std::string folder = [] {
    char name[] = "/tmp/syncbn-test-XXXXXX";
    return std::string(mkdtemp(name));
  }();
  return folder;
}

bool CanJoin(const std::string& target, std::shared_ptr<grpc::ChannelCredentials> credentials = nullptr) {
  RawStream stream(Connect(target, std::move(credentials)));
  return stream.Write(JoinFrame("g", 0, 1)) && stream.Read().has_value();
}

// ---- Addresses ------------------------------------------------------------------------------------------------------

TEST(ListeningTest, SeveralAddressesServeOneGroup) {
  const std::string path = absl::StrCat("unix:", SocketFolder(), "/several.sock");
  const auto server = Start({path, "127.0.0.1:0"});
  ASSERT_TRUE(server.ok()) << server.status();
  EXPECT_EQ((*server)->target(), path);
  EXPECT_GT((*server)->port(), 0);
  ASSERT_EQ((*server)->targets().size(), 2u);
  EXPECT_EQ((*server)->targets()[1], absl::StrCat("127.0.0.1:", (*server)->port()));
  RawStream local(Connect((*server)->targets()[0])), tcp(Connect((*server)->targets()[1]));
  uint32_t rank = 0;
  for (RawStream* stream : {&local, &tcp}) {
    v1::WorkerFrame frame = JoinFrame("g", rank++, 2);
    *frame.add_layers() = SumLayer("v", 1);
    *frame.add_contributions()->mutable_key() = Key("v", 0, v1::PHASE_SUM);
    frame.mutable_contributions(0)->mutable_vector()->add_value(rank);
    ASSERT_TRUE(stream->Write(frame));
  }
  for (RawStream* stream : {&local, &tcp}) {
    const auto answer = stream->ReadResults();
    ASSERT_TRUE(answer.has_value());
    EXPECT_EQ(answer->results(0).vector().value(0), 3.0);
  }
}

TEST(ListeningTest, MayEndAsSoonAsItHasBegun) {
  for (int i = 0; i < 50; ++i) {
    const auto server = Start({"127.0.0.1:0"});
    ASSERT_TRUE(server.ok()) << server.status();
  }
}

TEST(ListeningTest, UnixSocketsAloneHaveNoPort) {
  const auto server = Start({absl::StrCat("unix:", SocketFolder(), "/alone.sock")});
  ASSERT_TRUE(server.ok()) << server.status();
  EXPECT_EQ((*server)->port(), 0);
}

TEST(ListeningTest, RefusesToListenBeyondLoopback) {
  for (const char* address :
       {"0.0.0.0:0", "[::]:0", "192.0.2.1:0", "example.com:0", "127.0.0.1.example.com:0", "127.example.com:0", "0:0"}) {
    const auto server = Start({"127.0.0.1:0", address});
    EXPECT_EQ(server.status().code(), absl::StatusCode::kInvalidArgument) << address;
    EXPECT_THAT(std::string(server.status().message()), HasSubstr(absl::StrCat("\"", address, "\" is reachable")));
    EXPECT_THAT(std::string(server.status().message()), HasSubstr("--insecure"));
  }
}

TEST(ListeningTest, ListensBeyondLoopbackWhenToldTo) {
  MasterServer::Options options;
  options.addresses = {"0.0.0.0:0"};
  options.insecure = true;
  const auto server = MasterServer::Start(options);
  ASSERT_TRUE(server.ok()) << server.status();
  EXPECT_TRUE(CanJoin(absl::StrCat("127.0.0.1:", (*server)->port())));
}

TEST(ListeningTest, RefusesMalformedAddresses) {
  for (const char* address : {"", "127.0.0.1", "127.0.0.1:", ":50051", "unix"}) {
    EXPECT_EQ(Start({address}).status().code(), absl::StatusCode::kInvalidArgument) << address;
  }
  EXPECT_EQ(Start({}).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(ListeningTest, AnAddressInUseIsNamed) {
  const auto first = Start({"127.0.0.1:0"});
  ASSERT_TRUE(first.ok()) << first.status();
  const auto second = Start({"127.0.0.1:0", (*first)->target()});
  EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(second.status().message()), HasSubstr(absl::StrCat("\"", (*first)->target(), "\"")));
  EXPECT_TRUE(CanJoin((*first)->target()));
}

TEST(ListeningTest, ASocketInUseIsNotTakenOver) {
  const std::string path = absl::StrCat("unix:", SocketFolder(), "/used.sock");
  auto first = Start({path});
  ASSERT_TRUE(first.ok()) << first.status();
  const auto second = Start({path});
  EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(second.status().message()), HasSubstr(path));
  EXPECT_TRUE(CanJoin(path));
}

TEST(ListeningTest, ASocketThatADeadMasterLeftIsReplaced) {
  const std::string path = absl::StrCat(SocketFolder(), "/stale.sock");
  {
    // Bound by a server that has ended, its file put back by a link.
    const auto first = Start({absl::StrCat("unix:", path)});
    ASSERT_TRUE(first.ok()) << first.status();
    ASSERT_EQ(link(path.c_str(), absl::StrCat(path, ".kept").c_str()), 0);
  }
  rename(absl::StrCat(path, ".kept").c_str(), path.c_str());
  const auto second = Start({absl::StrCat("unix:", path)});
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_TRUE(CanJoin(absl::StrCat("unix:", path)));
}

// ---- TLS ------------------------------------------------------------------------------------------------------------

std::string Read(const std::string& path) {
  std::ifstream file(path);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

// An authority, and certificates for the server and for a worker that it signed; another authority with a worker of
// its own.
class TlsTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = absl::StrCat(SocketFolder(), "/tls");
    Shell(absl::StrCat("mkdir -p ", folder_));
    for (const char* authority : {"ca", "stranger-ca"}) {
      Shell(absl::StrCat("openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=",
                         authority, " -keyout ", authority, ".key -out ", authority, ".pem"));
    }
    Sign("server", "ca");
    Sign("worker", "ca");
    Sign("stranger", "stranger-ca");
  }

  static void Shell(const std::string& command) {
    ASSERT_EQ(system(absl::StrCat("cd ", folder_, " 2>/dev/null || cd /tmp; ", command, " 2>/dev/null").c_str()), 0)
        << command;
  }

  static void Sign(const std::string& name, const std::string& authority) {
    Shell(absl::StrCat("openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=", name,
                       " -keyout ", name, ".key -out ", name, ".csr"));
    Shell(absl::StrCat("printf 'subjectAltName=IP:127.0.0.1' > ", name, ".ext"));
    Shell(absl::StrCat("openssl x509 -req -days 2 -in ", name, ".csr -CA ", authority, ".pem -CAkey ", authority,
                       ".key -CAcreateserial -extfile ", name, ".ext -out ", name, ".pem"));
  }

  static std::string Path(const std::string& name) { return absl::StrCat(folder_, "/", name); }

  static MasterServer::Options Options(bool client_cert_auth) {
    MasterServer::Options options;
    options.addresses = {"127.0.0.1:0"};
    options.tls.cert_file = Path("server.pem");
    options.tls.key_file = Path("server.key");
    if (client_cert_auth) {
      options.tls.trusted_ca_file = Path("ca.pem");
      options.tls.client_cert_auth = true;
    }
    return options;
  }

  // `name` empty: without a certificate of its own.
  static std::shared_ptr<grpc::ChannelCredentials> Credentials(const std::string& name,
                                                               const std::string& authority = "ca") {
    grpc::SslCredentialsOptions options;
    options.pem_root_certs = Read(Path(authority + ".pem"));
    if (!name.empty()) {
      options.pem_cert_chain = Read(Path(name + ".pem"));
      options.pem_private_key = Read(Path(name + ".key"));
    }
    return grpc::SslCredentials(options);
  }

  static std::string folder_;
};

std::string TlsTest::folder_;

TEST_F(TlsTest, SpeaksTlsAlone) {
  const auto server = MasterServer::Start(Options(false));
  ASSERT_TRUE(server.ok()) << server.status();
  EXPECT_TRUE(CanJoin((*server)->target(), Credentials("")));
  EXPECT_FALSE(CanJoin((*server)->target()));
  EXPECT_FALSE(CanJoin((*server)->target(), Credentials("", "stranger-ca")));
}

TEST_F(TlsTest, AuthenticatesWorkers) {
  const auto server = MasterServer::Start(Options(true));
  ASSERT_TRUE(server.ok()) << server.status();
  EXPECT_TRUE(CanJoin((*server)->target(), Credentials("worker")));
  EXPECT_FALSE(CanJoin((*server)->target(), Credentials("")));
  EXPECT_FALSE(CanJoin((*server)->target(), Credentials("stranger")));
}

TEST_F(TlsTest, ListensBeyondLoopbackWithACertificate) {
  MasterServer::Options options = Options(true);
  options.addresses = {"0.0.0.0:0"};
  const auto server = MasterServer::Start(options);
  ASSERT_TRUE(server.ok()) << server.status();
  EXPECT_TRUE(CanJoin(absl::StrCat("127.0.0.1:", (*server)->port()), Credentials("worker")));
}

TEST_F(TlsTest, FilesThatCannotBeUsedAreRefused) {
  const auto expect_refusal = [](const MasterServer::Options& options, const std::string& message) {
    const auto server = MasterServer::Start(options);
    EXPECT_EQ(server.status().code(), absl::StatusCode::kInvalidArgument) << server.status();
    EXPECT_THAT(std::string(server.status().message()), HasSubstr(message));
  };
  MasterServer::Options options = Options(false);
  options.tls.cert_file = Path("nowhere.pem");
  expect_refusal(options, "nowhere.pem");
  options = Options(false);
  options.tls.key_file = "";
  expect_refusal(options, "certificate and its key");
  options = Options(false);
  options.tls.client_cert_auth = true;
  expect_refusal(options, "trusted CA");
  options = Options(false);
  options.tls.cert_file = Path("server.csr");  // PEM, but not a certificate.
  expect_refusal(options, "server.csr");
}

}  // namespace
}  // namespace syncbn::testing
