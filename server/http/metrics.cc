#include "server/http/metrics.h"

#include <sstream>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "plumbing/duration.h"
#include "prometheus/metric_family.h"
#include "prometheus/text_serializer.h"
#include "server/http/process_metrics.h"

namespace syncbn::http {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;
using Labels = std::vector<ClientMetric::Label>;

double Seconds(const google::protobuf::Duration& duration) { return absl::ToDoubleSeconds(FromProto(duration)); }

// One metric: its name, its help, and a value for each combination of labels.
class Family {
 public:
  Family(const char* name, const char* help, MetricType type) { family_ = {name, help, type, {}}; }

  void Add(Labels labels, double value) {
    ClientMetric metric;
    metric.label = std::move(labels);
    (family_.type == MetricType::Counter ? metric.counter.value : metric.gauge.value) = value;
    family_.metric.push_back(std::move(metric));
  }

  void Add(Labels labels, const v1::DurationHistogram& histogram) {
    ClientMetric metric;
    metric.label = std::move(labels);
    metric.histogram.sample_count = histogram.count();
    metric.histogram.sample_sum = Seconds(histogram.sum());
    uint64_t below = 0;
    for (const auto& bucket : histogram.buckets()) {
      if (!bucket.has_up_to()) break;  // The serializer adds the last, of all.
      below += bucket.count();
      metric.histogram.bucket.push_back({below, Seconds(bucket.up_to())});
    }
    family_.metric.push_back(std::move(metric));
  }

  void Collect(std::vector<MetricFamily>* all) && {
    if (!family_.metric.empty()) all->push_back(std::move(family_));
  }

 private:
  MetricFamily family_;
};

// The metrics that every group has.
class GroupFamilies {
 public:
  void Add(const v1::GetGroupResponse& group, uint32_t max_ranks) {
    const v1::GroupSummary& summary = group.summary();
    const v1::GroupStatistics& statistics = group.statistics();
    const Labels id = {{"job", summary.job()}, {"group", summary.group()}};
    const auto with = [&id](const char* name, std::string value) {
      Labels labels = id;
      labels.push_back({name, std::move(value)});
      return labels;
    };
    workers_.Add(with("state", "present"), statistics.present());
    workers_.Add(with("state", "lost"), statistics.lost());
    workers_.Add(with("state", "left"), statistics.left());
    workers_.Add(with("state", "absent"), statistics.absent());
    for (const v1::Count& count : statistics.joins()) {
      joins_.Add(with("result", absl::AsciiStrToLower(count.name())), static_cast<double>(count.count()));
    }
    for (const v1::Count& count : statistics.contributions()) {
      contributions_.Add(with("result", absl::AsciiStrToLower(count.name())), static_cast<double>(count.count()));
    }
    for (const v1::PhaseStatistics& phase : statistics.phases()) Add(id, phase);
    in_flight_.Add(id, summary.rounds_in_flight());
    oldest_.Add(id, Seconds(summary.oldest_round_age()));
    pending_bytes_.Add(id, static_cast<double>(statistics.pending_bytes()));
    retained_bytes_.Add(id, static_cast<double>(statistics.retained_bytes()));
    if (summary.world_size() > max_ranks) return;
    for (const v1::Member& member : group.members()) {
      // A rank that has never joined has no numbers, and a stranger's groups may have hundreds of them each.
      if (member.state() == v1::MEMBER_STATE_ABSENT) continue;
      const Labels of_rank = with("rank", absl::StrCat(member.rank()));
      last_arrivals_.Add(of_rank, static_cast<double>(member.last_arrivals()));
      lateness_.Add(of_rank, Seconds(member.lateness().sum()));
    }
  }

  void Collect(std::vector<MetricFamily>* all) && {
    for (Family* family : {&workers_, &joins_, &rounds_, &durations_, &in_flight_, &oldest_, &contributions_,
                           &last_arrivals_, &lateness_, &pending_bytes_, &retained_bytes_}) {
      std::move(*family).Collect(all);
    }
  }

 private:
  void Add(Labels labels, const v1::PhaseStatistics& phase) {
    labels.push_back({"phase", absl::AsciiStrToLower(v1::Phase_Name(phase.phase()).substr(sizeof("PHASE")))});
    durations_.Add(labels, phase.duration());
    labels.push_back({"result", "completed"});
    rounds_.Add(labels, static_cast<double>(phase.duration().count()));
    for (const v1::Count& failed : phase.failed()) {
      labels.back().value = absl::AsciiStrToLower(failed.name());
      rounds_.Add(labels, static_cast<double>(failed.count()));
    }
  }

  Family workers_{"syncbn_workers", "Workers of a group by their state.", MetricType::Gauge};
  Family joins_{"syncbn_joins_total", "Joins by their result: joined, or the reason of the refusal.",
                MetricType::Counter};
  Family rounds_{"syncbn_rounds_total", "Rounds that ended: completed, or the reason of the failure.",
                 MetricType::Counter};
  Family durations_{"syncbn_round_duration_seconds", "Time from the first contribution of a round to its completion.",
                    MetricType::Histogram};
  Family in_flight_{"syncbn_rounds_in_flight", "Rounds that have begun and not ended.", MetricType::Gauge};
  Family oldest_{"syncbn_oldest_round_age_seconds",
                 "Age of the oldest round in flight, 0 if there is none. It grows while somebody is waited for.",
                 MetricType::Gauge};
  Family contributions_{"syncbn_contributions_total",
                        "Contributions by their result: accepted, repeated, replayed, or the reason of the rejection.",
                        MetricType::Counter};
  Family last_arrivals_{"syncbn_last_arrivals_total", "Completed rounds to which the rank was the last to contribute.",
                        MetricType::Counter};
  Family lateness_{"syncbn_lateness_seconds_total",
                   "Time by which the rank's contributions came after the first of their rounds.", MetricType::Counter};
  Family pending_bytes_{"syncbn_pending_bytes", "Bytes of contributions to rounds in flight.", MetricType::Gauge};
  Family retained_bytes_{"syncbn_retained_bytes", "Bytes of ended rounds that are kept for replays.",
                         MetricType::Gauge};
};

// gRPC's name of a code, such as "InvalidArgument", from that of Abseil.
std::string CodeName(const std::string& name) {
  std::string code;
  bool upper = true;
  for (const char c : name) {
    if (c == '_') {
      upper = true;
    } else {
      code += std::exchange(upper, false) ? c : absl::ascii_tolower(static_cast<unsigned char>(c));
    }
  }
  return name == "OK" ? name : code;
}

void AddMaster(const v1::GetMasterResponse& master, std::vector<MetricFamily>* all) {
  Family info("syncbn_build_info", "Constant 1; the labels say what runs.", MetricType::Gauge);
  info.Add({{"version", master.version()},
            {"revision", master.revision()},
            {"protocol", absl::StrCat(master.protocol_version())},
            {"grpc", master.grpc_version()}},
           1.0);
  std::move(info).Collect(all);
  Family streams("syncbn_streams", "Workers' streams that are open.", MetricType::Gauge);
  streams.Add({}, master.streams());
  std::move(streams).Collect(all);
  Family unread("syncbn_stream_unread_bytes_max", "Most bytes that one worker has been sent and has not read.",
                MetricType::Gauge);
  unread.Add({}, static_cast<double>(master.stream_unread_bytes_max()));
  std::move(unread).Collect(all);
  Family closed("syncbn_streams_closed_total", "Streams that the master closed with an error, by its reason.",
                MetricType::Counter);
  for (const v1::Count& count : master.streams_closed()) {
    closed.Add({{"reason", absl::AsciiStrToLower(count.name())}}, static_cast<double>(count.count()));
  }
  std::move(closed).Collect(all);
  const Labels method = {
      {"grpc_type", "bidi_stream"}, {"grpc_service", "syncbn.v1.StatisticsService"}, {"grpc_method", "Synchronize"}};
  Family started("grpc_server_started_total", "Calls that have begun.", MetricType::Counter);
  started.Add(method, static_cast<double>(master.streams_started()));
  std::move(started).Collect(all);
  Family handled("grpc_server_handled_total", "Calls that have ended, by gRPC's code.", MetricType::Counter);
  for (const v1::Count& count : master.streams_ended()) {
    Labels labels = method;
    labels.push_back({"grpc_code", CodeName(count.name())});
    handled.Add(std::move(labels), static_cast<double>(count.count()));
  }
  std::move(handled).Collect(all);
}

void AddProcess(std::vector<MetricFamily>* all) {
  for (const ProcessMetric& metric : ReadProcessMetrics()) {
    Family family(metric.name, metric.help, metric.counter ? MetricType::Counter : MetricType::Gauge);
    family.Add({}, metric.value);
    std::move(family).Collect(all);
  }
}

}  // namespace

absl::StatusOr<std::string> MetricsText(const InspectionClient& client, const MetricsOptions& options) {
  std::vector<MetricFamily> all;
  const auto master = client.GetMaster();
  if (!master.ok()) return master.status();
  AddMaster(*master, &all);
  const auto groups = client.ListGroups();
  if (!groups.ok()) return groups.status();
  Family count("syncbn_groups", "Groups that exist.", MetricType::Gauge);
  count.Add({}, groups->groups_size());
  std::move(count).Collect(&all);
  GroupFamilies families;
  for (const v1::GroupSummary& summary : groups->groups()) {
    ReadMask mask;
    if (summary.world_size() <= options.max_ranks) mask.emplace_back("members");
    const auto group = client.GetGroup(summary.job(), summary.group(), mask);
    if (absl::IsNotFound(group.status())) continue;  // It has ended in the meantime.
    if (!group.ok()) return group.status();
    families.Add(*group, options.max_ranks);
  }
  std::move(families).Collect(&all);
  AddProcess(&all);
  std::ostringstream text;
  prometheus::TextSerializer().Serialize(text, all);
  return text.str();
}

}  // namespace syncbn::http
