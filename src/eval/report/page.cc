// The report page. Everything is inline: style, charts and data; it opens from a disk without a
// network.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "base/file.h"
#include "base/text.h"
#include "eval/report/summary.h"
#include "eval/report/svg.h"

namespace cambium {
namespace {

constexpr const char* kStyle = R"css(
:root { --ink:#1c2430; --soft:#5d6b7c; --rule:#dfe5ec; --back:#fbfcfd; --card:#ffffff;
  --a:#3b6fb6; --b:#2f9e73; --c:#c2571a; --d:#8a4fbf; --e:#b0862a; --f:#c13b62; --g:#4a8f9e; --h:#7a7f87; }
@media (prefers-color-scheme: dark) { :root { --ink:#e6ebf2; --soft:#9aa8b8; --rule:#2c3643;
  --back:#12171e; --card:#1a212b; --a:#7aa7e6; --b:#5fcf9f; --c:#f0935a; --d:#bb90ea; --e:#dcb45c;
  --f:#ef7f9f; --g:#7cc4d4; --h:#a5abb5; } }
body { margin:0; background:var(--back); color:var(--ink); font:16px/1.5 system-ui,sans-serif; }
main { max-width:1160px; margin:0 auto; padding:32px 20px 80px; }
h1 { font-size:30px; margin:0 0 4px; } h2 { font-size:20px; margin:40px 0 8px; }
p { margin:6px 0; } .soft { color:var(--soft); }
.cards { display:flex; flex-wrap:wrap; gap:12px; margin:20px 0; }
.card { background:var(--card); border:1px solid var(--rule); border-radius:10px; padding:12px 18px; flex:1 1 150px; }
.card b { font-size:26px; display:block; }
figure { margin:12px 0; background:var(--card); border:1px solid var(--rule); border-radius:10px; padding:14px; }
svg { width:100%; height:auto; display:block; }
svg text { fill:var(--ink); font:13px system-ui,sans-serif; } svg .tick { fill:var(--soft); font-size:12px; }
svg .grid { stroke:var(--rule); } svg .axis { stroke:var(--soft); }
svg .frontier { fill:none; stroke:var(--a); stroke-width:1.5; stroke-dasharray:4 4; opacity:.6; }
svg .point circle { fill:var(--a); } svg .point line { stroke:var(--a); stroke-width:1.5; }
svg .point.hollow circle { fill:var(--card); stroke:var(--a); stroke-width:1.5; }
svg .reference circle { fill:var(--c); } svg .reference line { stroke:var(--c); stroke-width:1.5; }
svg .bar { fill:var(--h); opacity:.55; } svg .bar.marked { fill:var(--a); opacity:1; }
svg .line { fill:none; stroke-width:2; }
svg .s0 { stroke:var(--a); } svg .s1 { stroke:var(--b); } svg .s2 { stroke:var(--c); } svg .s3 { stroke:var(--d); }
svg .s4 { stroke:var(--e); } svg .s5 { stroke:var(--f); } svg .s6 { stroke:var(--g); } svg .s7 { stroke:var(--h); }
.attention { fill:var(--c); background:var(--c); } .window { fill:var(--e); background:var(--e); }
.mamba { fill:var(--b); background:var(--b); } .mamba2 { fill:var(--g); background:var(--g); }
.gdn { fill:var(--a); background:var(--a); } .other { fill:var(--rule); background:var(--rule); }
.key { display:inline-block; width:12px; height:12px; border-radius:3px; margin:0 6px 0 14px; vertical-align:-1px; }
.wide { overflow-x:auto; } table { border-collapse:collapse; width:100%; font-size:14px; }
th,td { text-align:right; padding:6px 10px; border-bottom:1px solid var(--rule); white-space:nowrap; }
th:first-child,td:first-child { text-align:left; } th { color:var(--soft); font-weight:600; }
td.say { text-align:left; white-space:normal; } .no { color:var(--f); } .yes { color:var(--b); }
details { margin-top:28px; } pre { background:var(--card); border:1px solid var(--rule); border-radius:10px;
  padding:14px; overflow-x:auto; font-size:13px; }
)css";

std::string percent(double v) {
  return fmt::format("{:.1f} %", 100.0 * v);
}

std::string interval(const AccuracySummary& a) {
  if (a.total == 0) {
    return "–";
  }
  return fmt::format("{} <span class=\"soft\">[{:.1f}, {:.1f}]</span>", percent(a.accuracy.value),
                     100.0 * a.accuracy.low, 100.0 * a.accuracy.high);
}

std::string figure(const std::string& svg, const std::string& caption) {
  return "<figure>" + svg + "<figcaption class=\"soft\">" + escape_html(caption) +
         "</figcaption></figure>\n";
}

const ModelSummary* furthest_kept(const RunSummary& run) {
  const ModelSummary* best = nullptr;
  for (const ModelSummary& m : run.models) {
    if (m.converted > 0 && m.shipped && (best == nullptr || m.converted > best->converted)) {
      best = &m;
    }
  }
  return best;
}

std::string headline(const RunSummary& run) {
  const ModelSummary& teacher = run.models.front();
  const ModelSummary* best = furthest_kept(run);
  if (best == nullptr || best->speed.empty() || teacher.speed.empty()) {
    return "<p>No hybrid passed its gate; the teacher stands.</p>\n";
  }
  const SpeedSummary& from = teacher.speed.back();
  const SpeedSummary& to = best->speed.back();
  const double kept = teacher.accuracy.accuracy.value > 0.0
                          ? best->accuracy.accuracy.value / teacher.accuracy.accuracy.value
                          : 0.0;
  const auto card = [](const std::string& value, const std::string& text) {
    return "<div class=\"card\"><b>" + value + "</b><span class=\"soft\">" + text +
           "</span></div>\n";
  };
  std::string s = "<div class=\"cards\">\n";
  s += card(fmt::format("{:.2f}×", to.decode.value / from.decode.value),
            fmt::format("decode speed at {} tokens", from.context));
  s += card(percent(kept), "of the teacher's accuracy kept");
  s += card(
      fmt::format("−{:.0f} %", 100.0 - 100.0 * static_cast<double>(best->cache_bytes_per_token) /
                                           static_cast<double>(std::max<int64_t>(
                                               teacher.cache_bytes_per_token, 1))),
      "cache bytes a token");
  s += card(fmt::format("{} of {}", best->converted, layers_of_map(best->map).size()),
            "layers converted (" + escape_html(best->name) + ")");
  return s + "</div>\n";
}

std::string frontier(const RunSummary& run) {
  std::string out;
  const std::vector<SpeedSummary>& speeds = run.models.front().speed;
  for (size_t i = speeds.size(); i-- > 0;) {
    const auto charts = frontier_charts(std::span(&run, 1), speeds[i].context, speeds[i].batch);
    out +=
        figure(charts.front(),
               "Accuracy against decode speed, with 95 % intervals of accuracy and the least "
               "and largest speed seen. The teacher is the orange point, what was not trained is "
               "hollow.");
    if (charts.size() > 1 && i + 1 == speeds.size()) {
      out += figure(charts.back(),
                    "What is found in texts as a share of what the teacher finds, in the kind and "
                    "length of which a model keeps least.");
    }
  }
  return out;
}

std::string known(bool is, double value) {
  return "<td>" + (is ? svg::number(value) : "–") + "</td>";
}

std::string table(const RunSummary& run) {
  std::string s =
      "<div class=\"wide\"><table><tr><th>model</th><th>layers</th><th>gate</th><th>accuracy</th>"
      "<th>retrieval</th>";
  for (const RetrievalAt& at : run.models.front().retrieval_at) {
    s += "<th>" + escape_html(at.what) + "</th>";
  }
  s += "<th>answer tokens</th><th>right answers / s</th>";
  const bool options = run.models.front().sticky.total > 0;
  s += options ? "<th>same letter in all rotations</th>" : "";
  s += "<th>reverse KL</th><th>KL through a cache</th>";
  for (const SpeedSummary& speed : run.models.front().speed) {
    s += fmt::format("<th>decode @{}</th>", speed.context);
  }
  for (const SpeedSummary& speed : run.models.front().speed) {
    s += fmt::format("<th>prefill @{}</th>", speed.context);
  }
  const bool fitted = std::any_of(run.models.begin(), run.models.end(),
                                  [](const ModelSummary& m) { return m.fit.layers > 0; });
  s += fitted ? "<th>R² of new mixers, fitted</th>" : "";
  s += "<th>cache / token</th><th>state / sequence</th><th>NLL</th><th>same choice</th>"
       "<th>tokens trained</th></tr>\n";
  for (const ModelSummary& m : run.models) {
    s += fmt::format("<tr><td>{}</td><td>{}/{}</td><td class=\"{}\">{}</td><td>{}</td><td>{}</td>",
                     escape_html(m.name), m.converted, layers_of_map(m.map).size(),
                     m.gate.passed ? "yes" : "no",
                     m.converted == 0 ? "–" : (m.gate.passed ? "passed" : "failed"),
                     interval(m.accuracy), interval(m.retrieval));
    for (const RetrievalAt& at : run.models.front().retrieval_at) {
      const AccuracySummary* found = find_retrieval(m, at.what);
      s += "<td>" + (found == nullptr ? "–" : interval(*found)) + "</td>";
    }
    s += known(m.answer_tokens > 0.0, m.answer_tokens);
    const double right = right_answers_per_second(m);
    s += known(right > 0.0, right);
    s += options ? "<td>" + interval(m.sticky) + "</td>" : "";
    s += fmt::format("<td>{:.4f}</td><td>{}</td>", m.reverse_kl,
                     m.cached_kl < 0.0 ? "–" : fmt::format("{:.1e}", m.cached_kl));
    for (const SpeedSummary& speed : m.speed) {
      s += fmt::format("<td>{}</td>", svg::number(speed.decode.value));
    }
    for (const SpeedSummary& speed : m.speed) {
      s += fmt::format("<td>{}</td>", svg::number(speed.prefill.value));
    }
    if (fitted) {
      s += m.fit.layers == 0 ? "<td>–</td>"
                             : fmt::format("<td>{:.2f} → {:.2f}</td>", m.fit.before, m.fit.after);
    }
    s += fmt::format("<td>{}</td><td>{}</td><td>{:.4f}</td><td>{}</td><td>{}</td></tr>\n",
                     human_bytes(static_cast<uint64_t>(m.cache_bytes_per_token)),
                     human_bytes(static_cast<uint64_t>(m.state_bytes_per_sequence)), m.nll,
                     percent(m.agreement), human_count(static_cast<double>(m.tokens_trained)));
  }
  return s + "</table></div>\n";
}

std::string gates(const RunSummary& run) {
  std::string s =
      "<div class=\"wide\"><table><tr><th>stage</th><th>decision</th><th>attempts</th>"
      "<th style=\"text-align:left\">why</th></tr>\n";
  for (const ModelSummary& m : run.models) {
    if (m.converted > 0) {
      s += fmt::format(
          "<tr><td>{}</td><td class=\"{}\">{}</td><td>{}</td><td class=\"say\">{}</td></tr>\n",
          escape_html(m.name), m.gate.passed ? "yes" : "no", m.shipped ? "shipped" : "kept back",
          m.gate.attempts, escape_html(m.gate.reason));
    }
  }
  return s + "</table></div>\n";
}

std::string maps(const RunSummary& run) {
  std::vector<std::pair<std::string, std::vector<std::string>>> rows;
  std::string letters;
  for (const ModelSummary& m : run.models) {
    rows.emplace_back(m.name, layers_of_map(m.map));
    for (const std::string& layer : rows.back().second) {
      for (const char c : layer) {
        if (letters.find(c) == std::string::npos) {
          letters += c;
        }
      }
    }
  }
  std::string legend = "<p class=\"soft\">";
  for (const char c : letters) {
    legend += "<span class=\"key " + svg::letter_class(c) + "\"></span>" + svg::letter_class(c);
  }
  return figure(svg::layer_maps(rows), "The mixer of each layer, first layer on the left.") +
         legend + "</p>\n";
}

std::string importance(const RunSummary& run) {
  std::string s;
  for (const ImportanceSummary& i : run.importance) {
    std::vector<double> scores = i.scores;
    std::vector<bool> marked(scores.size(), false);
    for (size_t l = 0; l < scores.size(); ++l) {
      scores[l] = std::isfinite(scores[l]) ? scores[l] : 0.0;
      marked[l] = l < i.converted.size() && i.converted[l];
    }
    s +=
        figure(svg::bars(scores, marked, {.title = "layer"}, {.title = i.metric}),
               fmt::format("{}: {} of each layer that had attention; converted layers in colour.{}",
                           i.stage, i.method,
                           i.data.empty() ? "" : " Scored on " + escape_html(i.data) + "."));
  }
  return s;
}

std::string curves(const RunSummary& run) {
  std::string s;
  for (const char* phase : {"fit", "align", "distill", "sft"}) {
    std::vector<svg::Series> series;
    for (const CurveSummary& c : run.curves) {
      if (c.phase == phase) {
        series.push_back({c.stage, c.tokens, c.loss});
      }
    }
    if (!series.empty()) {
      const std::string name = phase;
      const bool mixers = name == "fit" || name == "align";
      s += figure(svg::lines(series, {.title = "tokens of the stage"},
                             {.title = mixers ? "alignment loss" : "loss", .log = true}),
                  mixers              ? "Mixer outputs against the teacher's, a curve a stage."
                  : name == "distill" ? "End-to-end distillation, a curve a stage."
                                      : "Supervised fine-tuning, a curve a stage.");
    }
  }
  std::vector<svg::Series> trained;
  for (const CurveSummary& c : run.curves) {
    const bool taught =
        std::any_of(c.reverse_kl.begin(), c.reverse_kl.end(), [](double v) { return v > 0.0; });
    if (c.phase == "distill" && taught) {
      trained.push_back({c.stage, c.tokens, c.reverse_kl});
    }
  }
  if (!trained.empty()) {
    s += figure(svg::lines(trained, {.title = "tokens of the stage"},
                           {.title = "reverse KL, nats a token", .log = true}),
                "Reverse KL to the teacher on the training text, a curve a stage.");
  }
  std::vector<svg::Series> kl{{"as converted", {}, {}}, {"healed", {}, {}}};
  for (const ModelSummary& m : run.models) {
    if (m.converted > 0) {
      for (svg::Series& series : kl) {
        series.x.push_back(static_cast<double>(m.converted));
      }
      kl[0].y.push_back(m.reverse_kl_converted);
      kl[1].y.push_back(m.reverse_kl);
    }
  }
  if (kl[0].x.size() > 1) {
    s += figure(svg::lines(kl, {.title = "layers converted"},
                           {.title = "held-out reverse KL, nats a token", .log = true}),
                "Distance from the teacher on held-out text: as each stage found it and left it.");
  }
  return s;
}

}  // namespace

std::string render_report(const RunSummary& run) {
  std::string s =
      "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">"
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">"
      "<title>" +
      escape_html(run.name) + " – Cambium</title><style>" + kStyle +
      "</style></head><body><main>\n";
  s += "<h1>" + escape_html(run.name) + "</h1>\n";
  s += fmt::format("<p class=\"soft\">{} · {} · {} · <code>{}</code></p>\n", escape_html(run.date),
                   escape_html(run.machine), human_duration(run.seconds), escape_html(run.command));
  if (!run.models.empty()) {
    s += headline(run);
    s += "<p>" + escape_html(run.task) + "</p>\n";
    s += "<h2>Score against throughput</h2>\n" + frontier(run);
    s += "<h2>Every model</h2>\n" + table(run);
    s += "<h2>Gates</h2>\n" + gates(run);
    s += "<h2>Layers</h2>\n" + maps(run);
    s += "<h2>Importance</h2>\n" + importance(run);
    s += "<h2>Training</h2>\n" + curves(run);
  }
  s += "<details><summary>The plan</summary><pre>" + escape_html(run.plan) + "</pre></details>\n";
  return s + "</main></body></html>\n";
}

void write_report(const RunSummary& run, const std::filesystem::path& folder) {
  write_file_atomically((folder / "report.html").string(), render_report(run));
  const std::span<const RunSummary> one(&run, 1);
  write_file_atomically((folder / "frontier.csv").string(), frontier_csv(one));
  if (!run.models.empty() && !run.models.front().speed.empty()) {
    write_file_atomically((folder / "frontier.svg").string(), render_frontiers(one));
  }
}

}  // namespace cambium
