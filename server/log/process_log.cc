#include "server/log/process_log.h"

#include <poll.h>
#include <unistd.h>

#include <climits>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "google/protobuf/stubs/logging.h"
#include "plumbing/log.h"
#include "spdlog/logger.h"
#include "spdlog/pattern_formatter.h"
#include "spdlog/sinks/base_sink.h"

namespace syncbn {
namespace {

// Returns whether a page can be written without blocking. stderr is shared with the program's parent and others, so it
// cannot be made non-blocking itself.
class StderrSink final : public spdlog::sinks::base_sink<std::mutex> {
 private:
  void sink_it_(const spdlog::details::log_msg& message) override {
    spdlog::memory_buf_t line;
    formatter_->format(message, line);
    std::string text(line.data(), line.size());
    if (text.size() > PIPE_BUF) {
      text.resize(PIPE_BUF - 4);
      text += "...\n";
    }
    if (lost_ != 0 && !Write(absl::StrCat(lost_, " lines of the log are lost: nobody read them\n"))) {
      ++lost_;
      return;
    }
    lost_ = 0;
    if (!Write(text)) ++lost_;
  }

  void flush_() override {}

  // At most PIPE_BUF bytes, which a pipe accepts as a whole.
  static bool Write(const std::string& text) {
    pollfd state = {STDERR_FILENO, POLLOUT, 0};
    if (poll(&state, 1, 0) != 1 || (state.revents & POLLOUT) == 0) return false;
    return write(STDERR_FILENO, text.data(), text.size()) >= 0;
  }

  uint64_t lost_ = 0;
};

// Escapes bytes that a terminal might interpret as commands.
std::string Escape(absl::string_view line) {
  std::string text;
  for (const char c : line) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte < 0x7f) {
      text += c;
    } else {
      absl::StrAppend(&text, "\\x", absl::Hex(byte, absl::kZeroPad2));
    }
  }
  return text;
}

spdlog::level::level_enum ToSpdlog(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug:
      return spdlog::level::debug;
    case LogLevel::kInfo:
      return spdlog::level::info;
    case LogLevel::kWarning:
      return spdlog::level::warn;
    case LogLevel::kError:
      return spdlog::level::err;
  }
  return spdlog::level::info;
}

void FromProtobuf(google::protobuf::LogLevel, const char*, int, const std::string& message) {
  Log(LogLevel::kDebug, absl::StrCat("protobuf: ", message));
}

}  // namespace

void LogToStderr(LogLevel level) {
  auto logger = std::make_shared<spdlog::logger>("syncbn-master", std::make_shared<StderrSink>());
  logger->set_level(ToSpdlog(level));
  logger->set_formatter(
      std::make_unique<spdlog::pattern_formatter>("%Y-%m-%dT%H:%M:%S.%eZ %l %v", spdlog::pattern_time_type::utc));
  SetLogSink([logger = std::move(logger)](LogLevel line_level, absl::string_view line) {
    const auto spdlog_level = ToSpdlog(line_level);
    if (!logger->should_log(spdlog_level)) return;
    const std::string text = Escape(line);
    logger->log(spdlog_level, spdlog::string_view_t(text.data(), text.size()));
  });
  google::protobuf::SetLogHandler(&FromProtobuf);
}

}  // namespace syncbn
