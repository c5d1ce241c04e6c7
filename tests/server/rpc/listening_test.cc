// The addresses of a master, those to whom it speaks, and what it refuses.

#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

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
#include "server/master_server.h"
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
  // A group of its own: the master may not have noticed yet that the stream before this one has ended.
  static int groups = 0;
  RawStream stream(Connect(target, std::move(credentials)));
  return stream.Write(JoinFrame(absl::StrCat("group-", ++groups), 0, 1)) && stream.Read().has_value();
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
  for (const char* address : {"0.0.0.0:0", "[::]:0", "192.0.2.1:0", "[2001:db8::1]:0", "0:0"}) {
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
  const std::string long_path(108, 'p');
  for (const auto& [address, message] : {
           std::pair<std::string, std::string>{"", "neither HOST:PORT nor unix:PATH"},
           {"127.0.0.1", "neither HOST:PORT nor unix:PATH"},
           {"127.0.0.1:", "neither HOST:PORT nor unix:PATH"},
           {":50051", "neither HOST:PORT nor unix:PATH"},
           {"unix", "neither HOST:PORT nor unix:PATH"},
           {"http://127.0.0.1:50051", "is a URL; an address is HOST:PORT or unix:PATH"},
           {"127.0.0.1:50051,[::1]:50051", "each address is given by itself"},
           {"unix:", "neither HOST:PORT nor unix:PATH"},
           {"unix-abstract:", "neither HOST:PORT nor unix:PATH"},
           {"127.0.0.1:65536", "port 65536 is not in 0 .. 65535"},
           {"127.0.0.1:70000", "port 70000 is not in 0 .. 65535"},
           {"127.0.0.1:99999999999999999999", "port 99999999999999999999 is not in 0 .. 65535"},
           {"127.0.0.1:-1", "port -1 is not in 0 .. 65535"},
           {"[::1]:70000", "port 70000 is not in 0 .. 65535"},
           {"foo:bar", "no such host or port"},
           {"127.0.0.1:http", "no such host or port"},
           {"127.0.0.1: 80", "no such host or port"},
           {"no such host:80", "no such host or port"},
           {"nowhere.invalid:80", "no such host or port"},
           {"127.0.0.1.nowhere.invalid:80", "no such host or port"},
           {"::1:50051", "brackets"},
           {"[localhost]:80", "no such host or port"},
           {"unix://relative", "begins with a slash"},
           {absl::StrCat("unix:", long_path), "108 bytes"},
           {absl::StrCat("unix-abstract:", long_path), "at most 107"},
       }) {
    const auto server = Start({address});
    EXPECT_EQ(server.status().code(), absl::StatusCode::kInvalidArgument) << address << ": " << server.status();
    EXPECT_THAT(std::string(server.status().message()), HasSubstr(message));
    EXPECT_THAT(std::string(server.status().message()), HasSubstr(absl::StrCat("\"", address, "\"")));
  }
  EXPECT_EQ(Start({}).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(ListeningTest, RefusesLimitsOfNothing) {
  for (const char* name : {"max_workers", "max_groups", "max_channels", "max_retained_bytes"}) {
    MasterServer::Options options;
    options.addresses = {"127.0.0.1:0"};
    if (name == std::string("max_workers")) options.limits.max_workers = 0;
    if (name == std::string("max_groups")) options.limits.max_groups = 0;
    if (name == std::string("max_channels")) options.limits.max_channels = 0;
    if (name == std::string("max_retained_bytes")) options.limits.max_retained_bytes = 0;
    const auto server = MasterServer::Start(options);
    EXPECT_EQ(server.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(server.status().message()), HasSubstr(absl::StrCat(name, " is 0")));
  }
}

TEST(ListeningTest, EveryFormOfAddress) {
  const std::string path = absl::StrCat(SocketFolder(), "/forms.sock");
  const std::string abstract = absl::StrCat("unix-abstract:syncbn-test-", getpid());
  const std::string longest = absl::StrCat(SocketFolder(), "/", std::string(107 - SocketFolder().size() - 1, 'p'));
  ASSERT_EQ(longest.size(), 107u);
  const auto server = Start({absl::StrCat("unix://", path), abstract, absl::StrCat("unix:", longest), "localhost:0"});
  ASSERT_TRUE(server.ok()) << server.status();
  for (const std::string& target : (*server)->targets()) EXPECT_TRUE(CanJoin(target)) << target;
  EXPECT_EQ((*server)->targets()[3], absl::StrCat("localhost:", (*server)->port()));
}

TEST(ListeningTest, Ipv6Literals) {
  const auto server = Start({"[::1]:0"});
  if (!server.ok() && server.status().code() == absl::StatusCode::kUnavailable) GTEST_SKIP() << server.status();
  ASSERT_TRUE(server.ok()) << server.status();
  EXPECT_EQ((*server)->target(), absl::StrCat("[::1]:", (*server)->port()));
  EXPECT_TRUE(CanJoin((*server)->target()));
}

TEST(ListeningTest, TheSystemsReasonIsTold) {
  const std::string folder = absl::StrCat(SocketFolder(), "/folder");
  const std::string file = absl::StrCat(SocketFolder(), "/file");
  mkdir(folder.c_str(), 0700);
  std::ofstream(file) << "kept";
  const auto expect = [](const std::string& address, const std::string& reason) {
    const auto server = Start({address});
    EXPECT_EQ(server.status().code(), absl::StatusCode::kUnavailable) << server.status();
    EXPECT_THAT(std::string(server.status().message()), HasSubstr(absl::StrCat("cannot listen on \"", address, "\"")));
    EXPECT_THAT(std::string(server.status().message()), HasSubstr(reason));
  };
  expect(absl::StrCat("unix:", folder), "file of another kind");
  expect(absl::StrCat("unix:", file), "file of another kind");
  expect(absl::StrCat("unix:", SocketFolder(), "/nowhere/a.sock"), "no such file or directory");
  expect(absl::StrCat("unix:", file, "/a.sock"), "not a directory");
  EXPECT_TRUE(std::ifstream(file).good());
  const auto first = Start({"127.0.0.1:0"});
  ASSERT_TRUE(first.ok()) << first.status();
  expect((*first)->target(), "address already in use");
  MasterServer::Options options;
  options.addresses = {"192.0.2.1:0"};
  options.insecure = true;
  EXPECT_THAT(std::string(MasterServer::Start(options).status().message()),
              HasSubstr("cannot assign requested address"));
}

TEST(ListeningTest, OneAddressTwiceIsInUse) {
  const auto first = Start({"127.0.0.1:0"});
  ASSERT_TRUE(first.ok()) << first.status();
  const std::string target = (*first)->target();
  const std::string path = absl::StrCat("unix:", SocketFolder(), "/twice.sock");
  const auto second = Start({path, path});
  EXPECT_THAT(std::string(second.status().message()), HasSubstr("address already in use"));
  EXPECT_TRUE(Start({path}).ok()) << "what could not start has left its socket";
}

TEST(ListeningTest, TheSocketsFileGoesWithTheMaster) {
  const std::string path = absl::StrCat(SocketFolder(), "/gone.sock");
  {
    const auto server = Start({absl::StrCat("unix:", path)});
    ASSERT_TRUE(server.ok()) << server.status();
    EXPECT_EQ(access(path.c_str(), F_OK), 0);
  }
  EXPECT_NE(access(path.c_str(), F_OK), 0);
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

// The message that it is refused with.
void ExpectRefusal(const MasterServer::Options& options, const std::string& message) {
  const auto server = MasterServer::Start(options);
  EXPECT_EQ(server.status().code(), absl::StatusCode::kInvalidArgument) << server.status();
  EXPECT_THAT(std::string(server.status().message()), HasSubstr(message));
}

TEST_F(TlsTest, FilesThatCannotBeUsedAreRefused) {
  Shell("openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:prime256v1 -out other.key");
  Shell("openssl pkey -in server.key -aes128 -passout pass:secret -out locked.key");
  Shell("openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days -1 -out expired.pem");
  Shell("sed '3s/[A-Za-z]/!/g' server.pem > damaged.pem; : > empty.pem");
  for (const auto& [file, message] : {std::pair<std::string, std::string>{"nowhere.pem", "cannot read the certificate"},
                                      {"server.csr", "has no PEM block of a CERTIFICATE"},
                                      {"empty.pem", "has no PEM block of a CERTIFICATE"},
                                      {"damaged.pem", "has no PEM block of a CERTIFICATE"},
                                      {"expired.pem", "expired on"},
                                      {"worker.pem", "does not belong to the certificate"},
                                      {".", "cannot read the certificate"}}) {
    MasterServer::Options options = Options(false);
    options.tls.cert_file = Path(file);
    ExpectRefusal(options, message);
    ExpectRefusal(options, Path(file));
  }
  for (const auto& [file, message] : {std::pair<std::string, std::string>{"nowhere.key", "cannot read the key"},
                                      {"server.pem", "has no PEM block of a PRIVATE KEY"},
                                      {"locked.key", "without a passphrase"},
                                      {"other.key", "does not belong to the certificate"}}) {
    MasterServer::Options options = Options(false);
    options.tls.key_file = Path(file);
    ExpectRefusal(options, message);
    ExpectRefusal(options, Path(file));
  }
  for (const std::string file : {"nowhere.pem", "server.key", "empty.pem"}) {
    MasterServer::Options options = Options(true);
    options.tls.trusted_ca_file = Path(file);
    ExpectRefusal(options, Path(file));
  }
}

TEST_F(TlsTest, HalfOfWhatIsNeededIsRefused) {
  MasterServer::Options options = Options(false);
  options.tls.key_file = "";
  ExpectRefusal(options, "certificate and its key");
  options = Options(false);
  options.tls.cert_file = "";
  ExpectRefusal(options, "certificate and its key");
  options = Options(false);
  options.tls.client_cert_auth = true;
  ExpectRefusal(options, "trusted CA");
  options = Options(true);
  options.tls.cert_file = options.tls.key_file = "";
  ExpectRefusal(options, "trusted CA");
  options = Options(true);
  options.tls.client_cert_auth = false;  // Nobody would be asked for a certificate.
  ExpectRefusal(options, "--client-cert-auth");
}

TEST_F(TlsTest, CertificatesAreReloadedUnderOpenStreams) {
  Shell("mkdir -p live; cp server.pem live/cert.pem; cp server.key live/key.pem; cp ca.pem live/ca.pem");
  MasterServer::Options options = Options(true);
  options.tls.cert_file = Path("live/cert.pem");
  options.tls.key_file = Path("live/key.pem");
  options.tls.trusted_ca_file = Path("live/ca.pem");
  const auto server = MasterServer::Start(options);
  ASSERT_TRUE(server.ok()) << server.status();
  const std::string target = (*server)->target();
  RawStream before(Connect(target, Credentials("worker")));
  ASSERT_TRUE(before.Write(JoinFrame("before", 0, 1)));
  ASSERT_TRUE(before.Read().has_value());

  // A bad one changes nothing.
  Shell("cp worker.pem live/cert.pem");
  EXPECT_EQ((*server)->ReloadCertificates().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(CanJoin(target, Credentials("worker")));

  // Certificates of another authority, for both sides.
  Sign("new-server", "stranger-ca");
  Shell("cp new-server.pem live/cert.pem; cp new-server.key live/key.pem; cp stranger-ca.pem live/ca.pem");
  ASSERT_TRUE((*server)->ReloadCertificates().ok());
  EXPECT_TRUE(CanJoin(target, Credentials("stranger", "stranger-ca")));
  EXPECT_FALSE(CanJoin(target, Credentials("worker")));

  // The stream that was open goes on.
  v1::WorkerFrame frame;
  *frame.add_layers() = SumLayer("v", 1);
  *frame.add_contributions()->mutable_key() = Key("v", 0, v1::PHASE_SUM);
  frame.mutable_contributions(0)->mutable_vector()->add_value(2.0);
  ASSERT_TRUE(before.Write(frame));
  const auto answer = before.ReadResults();
  ASSERT_TRUE(answer.has_value());
  EXPECT_EQ(answer->results(0).vector().value(0), 2.0);
}

TEST_F(TlsTest, WithoutTlsThereIsNothingToReload) {
  const auto server = Start({"127.0.0.1:0"});
  ASSERT_TRUE(server.ok()) << server.status();
  EXPECT_EQ((*server)->ReloadCertificates().code(), absl::StatusCode::kFailedPrecondition);
}

}  // namespace
}  // namespace syncbn::testing
