// Masters in a forked child: refused at once, where the process above has used gRPC. The order of the tests matters, as
// no process forgets that it has.

#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "client/cc/errors.h"
#include "gtest/gtest.h"
#include "server/http/http_server.h"
#include "server/master_server.h"

namespace syncbn::testing {
namespace {

constexpr unsigned kPatienceSeconds = 300;

absl::StatusOr<std::unique_ptr<MasterServer>> Start(const std::string& address) {
  MasterServer::Options options;
  options.addresses = {address};
  return MasterServer::Start(std::move(options));
}

// The child's report: empty if everything is right.
std::string InChild(const std::function<std::string()>& body) {
  int ends[2];
  EXPECT_EQ(pipe(ends), 0);
  const pid_t child = fork();
  if (child == 0) {
    alarm(kPatienceSeconds);
    const std::string said = body();
    _exit(write(ends[1], said.data(), said.size()) == static_cast<ssize_t>(said.size()) ? 0 : 1);
  }
  close(ends[1]);
  std::string said;
  char buffer[256];
  for (ssize_t size = 0; (size = read(ends[0], buffer, sizeof(buffer))) > 0;) said.append(buffer, size);
  close(ends[0]);
  int status = 0;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0) << "the child crashed, or hung";
  return said;
}

std::string CheckRefused(const std::string& words) {
  const absl::Status status = Start("127.0.0.1:0").status();
  const bool right = status.code() == absl::StatusCode::kFailedPrecondition && DetailsOf(status).reason == "FORKED" &&
                     std::string(status.message()).find(words) != std::string::npos;
  return right ? "" : absl::StrCat("Start returned: ", status.ToString());
}

TEST(ForkedTest, AStartThatFailedForItsOptionsForbidsNothing) {
  ASSERT_EQ(Start("nowhere").status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(InChild([]() -> std::string {
              const auto server = Start("127.0.0.1:0");
              return server.ok() ? "" : server.status().ToString();
            }),
            "");
}

TEST(ForkedTest, AChildOfAProcessWithAnOpenMasterIsRefused) {
  auto server = Start("127.0.0.1:0");
  ASSERT_TRUE(server.ok()) << server.status();
  EXPECT_EQ(InChild([&] {
              std::string said = CheckRefused("has an open worker/master");
              server->reset();  // Does nothing, and the answer stays.
              said += CheckRefused("has an open worker/master");
              return said + InChild([] { return CheckRefused("has an open worker/master"); });
            }),
            "");
  EXPECT_TRUE(Start("127.0.0.1:0").ok());  // The parent is as free as before.
}

TEST(ForkedTest, AChildDoesNotHoldThePortOfThePages) {
  auto server = Start("127.0.0.1:0");
  ASSERT_TRUE(server.ok()) << server.status();
  http::HttpOptions options;
  options.address = "127.0.0.1:0";
  auto pages = http::HttpServer::Start(options, (*server)->InProcessChannel());
  ASSERT_TRUE(pages.ok()) << pages.status();
  options.address = (*pages)->address();
  int ends[2], begun[2];
  ASSERT_EQ(pipe(ends), 0);
  ASSERT_EQ(pipe(begun), 0);
  const pid_t child = fork();
  if (child == 0) {
    char byte = 0;
    pages->reset();  // Does nothing.
    close(ends[1]);
    if (write(begun[1], &byte, 1) != 1) _exit(2);
    _exit(static_cast<int>(read(ends[0], &byte, 1)));  // Lives until the parent has looked.
  }
  close(begun[1]);
  // A child closes its copies as its first act, which fork() does not wait for.
  char byte = 0;
  ASSERT_EQ(read(begun[0], &byte, 1), 1);
  close(begun[0]);
  pages->reset();
  pages = http::HttpServer::Start(options, (*server)->InProcessChannel());
  EXPECT_TRUE(pages.ok()) << pages.status();
  close(ends[1]);
  close(ends[0]);
  int status = 0;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

TEST(ForkedTest, AChildOfAProcessThatHasClosedItsMasterIsRefused) {
  auto server = Start("127.0.0.1:0");
  ASSERT_TRUE(server.ok()) << server.status();
  server->reset();
  EXPECT_EQ(InChild([] { return CheckRefused("has had an open worker/master"); }), "");
}

}  // namespace
}  // namespace syncbn::testing
