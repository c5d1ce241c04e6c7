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

// Writes only where a page can be written without blocking. stderr is shared with the program's parent and others, so
// it cannot be made non-blocking itself.
class StderrSink final : public spdlog::sinks::base_sink<std::mutex> {
 public:
  explicit StderrSink(bool json) : json_(json) {}

 private:
  void sink_it_(const spdlog::details::log_msg& message) override {
    spdlog::memory_buf_t line;
    formatter_->format(message, line);
    std::string text(line.data(), line.size());
    if (text.size() > PIPE_BUF) {
      text.resize(PIPE_BUF - 4);
      text += "...\n";
    }
    if (lost_ != 0 && !Write(Lost(message))) {
      ++lost_;
      return;
    }
    lost_ = 0;
    if (!Write(text)) ++lost_;
  }

  // Returns the line that says how many are lost.
  std::string Lost(const spdlog::details::log_msg& like) {
    const std::string text = absl::StrCat(lost_, " lines of the log are lost: nobody read them");
    const std::string payload = json_ ? absl::StrCat("\"message\":\"", text, "\"") : text;
    const spdlog::details::log_msg message(like.time, {}, like.logger_name, spdlog::level::warn, payload);
    spdlog::memory_buf_t line;
    formatter_->format(message, line);
    return std::string(line.data(), line.size());
  }

  void flush_() override {}

  // At most PIPE_BUF bytes, which a pipe accepts as a whole.
  static bool Write(const std::string& text) {
    pollfd state = {STDERR_FILENO, POLLOUT, 0};
    if (poll(&state, 1, 0) != 1 || (state.revents & POLLOUT) == 0) return false;
    return write(STDERR_FILENO, text.data(), text.size()) >= 0;
  }

  const bool json_;
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

// Returns the text as a JSON string. Bytes beyond ASCII become the characters of the same numbers, since the text may
// not be UTF-8.
std::string Quote(absl::string_view text) {
  std::string quoted = "\"";
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      quoted += '\\';
      quoted += c;
    } else if (byte >= 0x20 && byte < 0x7f) {
      quoted += c;
    } else {
      absl::StrAppend(&quoted, "\\u00", absl::Hex(byte, absl::kZeroPad2));
    }
  }
  return quoted + "\"";
}

// Returns the members of a JSON object, but for time and level. What is too long for one write to a pipe is cut off
// within its string, so that the line stays JSON.
std::string JsonMembers(const LogRecord& record) {
  for (size_t longest = 2048;; longest /= 2) {
    std::string json = absl::StrCat("\"message\":", Quote(record.text.substr(0, longest)));
    for (const LogField& field : record.fields) {
      const absl::string_view value = field.value;
      absl::StrAppend(&json, ",", Quote(field.name), ":", Quote(value.substr(0, longest)));
    }
    if (json.size() + 100 <= PIPE_BUF || longest == 1) return json;
  }
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

void LogToStderr(LogLevel level, LogFormat format) {
  const bool json = format == LogFormat::kJson;
  auto logger = std::make_shared<spdlog::logger>("syncbn-master", std::make_shared<StderrSink>(json));
  logger->set_level(ToSpdlog(level));
  logger->set_formatter(std::make_unique<spdlog::pattern_formatter>(
      json ? R"({"time":"%Y-%m-%dT%H:%M:%S.%eZ","level":"%l",%v})" : "%Y-%m-%dT%H:%M:%S.%eZ %l %v",
      spdlog::pattern_time_type::utc));
  SetLogRecordSink([logger = std::move(logger), json](const LogRecord& record) {
    const auto spdlog_level = ToSpdlog(record.level);
    if (!logger->should_log(spdlog_level)) return;
    const std::string text = json ? JsonMembers(record) : Escape(record.text);
    logger->log(spdlog_level, spdlog::string_view_t(text.data(), text.size()));
  });
  google::protobuf::SetLogHandler(&FromProtobuf);
}

}  // namespace syncbn
