// Bytes in several pieces, and fields read from them.

#include "plumbing/byte_pieces.h"

#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/slice.h"
#include "gtest/gtest.h"
#include "plumbing/buffer_pieces.h"
#include "plumbing/wire_reader.h"

namespace syncbn {
namespace {

// Cuts the bytes at random places; some pieces are empty.
std::vector<absl::string_view> Cut(absl::string_view bytes, std::mt19937& random) {
  std::vector<absl::string_view> pieces;
  while (!bytes.empty()) {
    const size_t size = random() % (bytes.size() + 1);
    pieces.push_back(bytes.substr(0, size));
    bytes.remove_prefix(size);
  }
  if (random() % 2 == 0) pieces.emplace_back();
  return pieces;
}

std::string Copy(const BytePieces& pieces) {
  std::string copy(pieces.size(), '\0');
  pieces.CopyTo(copy.data());
  return copy;
}

TEST(BytePiecesTest, AreOneString) {
  std::mt19937 random(1);
  for (int i = 0; i < 2000; ++i) {
    std::string whole;
    for (size_t size = random() % 40; whole.size() < size;) whole.push_back(static_cast<char>(random()));
    const std::vector<absl::string_view> cut = Cut(whole, random);
    BytePieces pieces(cut);
    for (absl::string_view rest = whole; !rest.empty();) {
      ASSERT_EQ(pieces.size(), rest.size());
      ASSERT_EQ(Copy(pieces), rest);
      std::string copy = "old";
      ASSERT_EQ(pieces.Join(&copy), rest);
      ASSERT_EQ(pieces.whole(), copy == "old") << "only what is cut is copied";
      ASSERT_FALSE(pieces.front().empty());
      const size_t taken = random() % (rest.size() + 1);
      ASSERT_EQ(Copy(pieces.TakePrefix(taken)), rest.substr(0, taken));
      rest.remove_prefix(taken);
    }
    EXPECT_TRUE(pieces.empty() && pieces.whole() && pieces.front().empty());
  }
}

TEST(BytePiecesDeathTest, HaveNoMoreThanTheyHave) {
  const absl::string_view cut[] = {"ab", "c"};
  EXPECT_DEATH(BytePieces(cut).RemovePrefix(4), "4 of 3");
}

// Reads fields until the end; what they are, as text.
std::string Fields(const BytePieces& message) {
  std::string text;
  WireReader fields(message);
  while (fields.Next()) {
    const bool bytes = fields.type() == WireType::kBytes;
    absl::StrAppend(&text, fields.number(), ":", bytes ? Copy(fields.bytes()) : absl::StrCat(fields.integer()), ";");
  }
  return absl::StrCat(text, fields.well_formed() ? "" : "malformed");
}

TEST(WireReaderTest, ReadsTheSameWhereverTheMessageIsCut) {
  // A number, a fixed one of each length, bytes, and a number of the greatest length.
  std::string message =
      "\x08\x96\x01\x11" + std::string(7, '\1') + "\x80\x1d" + std::string("\1\2\3\4", 4) + "\x22\3abc";
  message += "\xf8\xff\xff\xff\x0f" + std::string(9, '\xff') + "\1";
  const std::string expected = "1:150;2:9223654615654924545;3:67305985;4:abc;536870911:18446744073709551615;";
  ASSERT_EQ(Fields(absl::string_view(message)), expected);
  std::mt19937 random(2);
  for (int i = 0; i < 5000; ++i) {
    std::string bytes = message;
    const int damage = i % 4;
    if (damage == 1) bytes[random() % bytes.size()] = static_cast<char>(random());
    if (damage == 2) bytes.resize(random() % bytes.size());
    const std::vector<absl::string_view> cut = Cut(bytes, random);
    ASSERT_EQ(Fields(BytePieces(cut)), Fields(absl::string_view(bytes)));
  }
}

TEST(BufferPiecesTest, AreTheSlicesOfABuffer) {
  const grpc::Slice slices[] = {grpc::Slice(std::string(100, 'a')), grpc::Slice(""), grpc::Slice("b")};
  grpc::ByteBuffer buffer(slices, 3);
  const BufferPieces pieces(&buffer);
  EXPECT_EQ(Copy(pieces.bytes()), std::string(100, 'a') + "b");
  EXPECT_EQ(pieces.pieces().front().data(), reinterpret_cast<const char*>(slices[0].begin())) << "nothing is copied";
}

// A list of them would take many times the length of the message.
TEST(BufferPiecesTest, ManyShortSlicesBecomeOnePiece) {
  const std::vector<grpc::Slice> slices(10000, grpc::Slice("ab"));
  grpc::ByteBuffer buffer(slices.data(), slices.size());
  const BufferPieces pieces(&buffer);
  EXPECT_EQ(pieces.pieces().size(), 1u);
  ASSERT_EQ(pieces.bytes().size(), 20000u);
  EXPECT_EQ(Copy(pieces.bytes()).substr(19990), "ababababab");
}

TEST(BufferPiecesTest, ManyLongSlicesStayWhereTheyAre) {
  const std::vector<grpc::Slice> slices(200, grpc::Slice(std::string(4096, 'a')));
  grpc::ByteBuffer buffer(slices.data(), slices.size());
  EXPECT_EQ(BufferPieces(&buffer).pieces().size(), 200u);
}

TEST(BufferPiecesTest, ABufferWithoutBytesHasNone) {
  grpc::ByteBuffer buffer;
  EXPECT_TRUE(BufferPieces(&buffer).bytes().empty());
}

}  // namespace
}  // namespace syncbn
