// PROTOCOL.md against a master: the bytes that it shows, and statements that no other test covers.

#include <fstream>
#include <memory>
#include <sstream>
#include <string>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "gtest/gtest.h"
#include "server/master_server.h"
#include "tests/server/rpc/raw_stream.h"

namespace syncbn::testing {
namespace {

// The block "```hex NAME": on each line bytes, then "|" and what they mean.
std::string BytesOf(const std::string& name) {
  std::ifstream document("proto/PROTOCOL.md");
  EXPECT_TRUE(document.good());
  std::string line, hex;
  while (std::getline(document, line) && line != absl::StrCat("```hex ", name)) {
  }
  while (std::getline(document, line) && line != "```") hex += line.substr(0, line.find('|'));
  return absl::HexStringToBytes(absl::StrReplaceAll(hex, {{" ", ""}}));
}

TEST(ProtocolDocumentTest, ItsExampleIsWhatGoesOverTheWire) {
  const std::string join = BytesOf("join"), contribution = BytesOf("contribution"), result = BytesOf("result");
  ASSERT_EQ(join.size(), 28u);
  ASSERT_EQ(contribution.size(), 35u);
  ASSERT_EQ(result.size(), 46u);
  MasterServer::Options options;
  options.addresses = {"127.0.0.1:0"};
  const auto server = MasterServer::Start(options);
  ASSERT_TRUE(server.ok()) << server.status();
  RawStream first(Connect((*server)->target())), second(Connect((*server)->target()));
  ASSERT_TRUE(first.WriteBytes(join));
  ASSERT_TRUE(first.Read()->has_joined());
  ASSERT_TRUE(first.WriteBytes(contribution));
  v1::WorkerFrame frame = JoinFrame("", 1, 2);
  *frame.add_layers() = BatchNormLayer("bn1", 1);
  *frame.add_contributions()->mutable_key() = Key("bn1", 0, v1::PHASE_FORWARD);
  v1::Moments* const moments = frame.mutable_contributions(0)->mutable_moments();
  moments->set_count(1);
  moments->add_mean(4.0);
  moments->add_m2(0.0);
  ASSERT_TRUE(second.Write(frame));
  for (RawStream* stream : {&first, &second}) {
    std::string received;
    ASSERT_TRUE(stream->ReadResults(&received).has_value());
    EXPECT_EQ(absl::BytesToHexString(received), absl::BytesToHexString(result));
  }
}

TEST(ProtocolDocumentTest, ItsFramesAreWhatTheMessagesSerializeTo) {
  for (const char* name : {"join", "contribution"}) {
    v1::WorkerFrame frame;
    ASSERT_TRUE(frame.ParseFromString(BytesOf(name))) << name;
    EXPECT_EQ(frame.SerializeAsString(), BytesOf(name)) << name;
  }
}

// Section 1: "A half-close is not a leave: once the call has ended, the worker is lost."
TEST(ProtocolDocumentTest, AHalfCloseIsALoss) {
  MasterServer::Options options;
  options.addresses = {"127.0.0.1:0"};
  const auto server = MasterServer::Start(options);
  ASSERT_TRUE(server.ok()) << server.status();
  RawStream stays(Connect((*server)->target())), goes(Connect((*server)->target()));
  ASSERT_TRUE(stays.Write(JoinFrame("", 0, 2)));
  ASSERT_TRUE(stays.Read()->has_joined());
  ASSERT_TRUE(goes.Write(JoinFrame("", 1, 2)));
  ASSERT_TRUE(goes.Read()->has_joined());
  ASSERT_EQ(stays.Read()->membership().present_ranks_size(), 2);
  ASSERT_TRUE(goes.WritesDone());
  EXPECT_TRUE(goes.Finish().ok());
  const auto told = stays.Read();
  ASSERT_TRUE(told.has_value());
  EXPECT_EQ(told->membership().present_ranks_size(), 1);
  EXPECT_EQ(told->membership().left_ranks_size(), 0);
}

}  // namespace
}  // namespace syncbn::testing
