//! Counters and histograms in Prometheus' text, under vLLM's names where it has them.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use std::collections::BTreeMap;

use vora_infer::{EngineStats, Event, FinishReason};

/// Upper bounds in seconds.
const FIRST: &[f64] =
    &[0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];
const BETWEEN: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5];
const WHOLE: &[f64] =
    &[0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0];

/// What is counted here; the engine counts the rest.
#[derive(Debug)]
pub(crate) struct Metrics {
    queued: Histogram,
    first: Histogram,
    between: Histogram,
    each: Histogram,
    whole: Histogram,
    stopped: AtomicU64,
    length: AtomicU64,
    failed: AtomicU64,
    responses: Mutex<BTreeMap<(&'static str, u16), u64>>,
}

#[derive(Debug)]
struct Histogram {
    bounds: &'static [f64],
    counts: Vec<AtomicU64>, // one more than bounds
    micros: AtomicU64,
}

/// Follows one answer.
#[derive(Debug)]
pub(crate) struct Watch {
    metrics: Arc<Metrics>,
    received: Instant,
    first: Option<Instant>,
    last: Instant,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            queued: Histogram::new(FIRST),
            first: Histogram::new(FIRST),
            between: Histogram::new(BETWEEN),
            each: Histogram::new(BETWEEN),
            whole: Histogram::new(WHOLE),
            stopped: AtomicU64::new(0),
            length: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            responses: Mutex::default(),
        }
    }
}

impl Watch {
    pub(crate) fn new(metrics: Arc<Metrics>, received: Instant) -> Self {
        Self { metrics, received, first: None, last: received }
    }

    /// Takes note of what became of a request.
    pub(crate) fn saw(&mut self, event: &Event) {
        let (now, metrics) = (Instant::now(), &self.metrics);
        match event {
            Event::Started { .. } => metrics.queued.add(now - self.received),
            Event::Text { .. } => {
                match self.first {
                    None => metrics.first.add(now - self.received),
                    Some(_) => metrics.between.add(now - self.last),
                }
                self.first.get_or_insert(now);
                self.last = now;
            }
            Event::Finished { reason, completion_tokens } => {
                metrics.whole.add(now - self.received);
                if let (Some(first), 2..) = (self.first, *completion_tokens) {
                    metrics.each.add((now - first) / (*completion_tokens as u32 - 1));
                }
                let count = if *reason == FinishReason::Length { &metrics.length } else { &metrics.stopped };
                count.fetch_add(1, Ordering::Relaxed);
            }
            Event::Failed(_) => drop(metrics.failed.fetch_add(1, Ordering::Relaxed)),
            _ => {}
        }
    }
}

impl Metrics {
    pub(crate) fn responded(&self, route: &'static str, status: u16) {
        let mut responses = self.responses.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        *responses.entry((route, status)).or_default() += 1;
    }

    /// Everything, for a model of this name.
    pub(crate) fn text(&self, name: &str, stats: &EngineStats, connections: u64) -> String {
        let mut page = Page { text: String::new(), model: escape(name) };
        let used = stats.used_pages as f64 / stats.cache_pages.max(1) as f64;
        page.one("num_requests_running", "gauge", "Requests that are being answered.", stats.running as f64);
        page.one("num_requests_waiting", "gauge", "Requests that wait for a place.", stats.waiting as f64);
        page.one("kv_cache_usage_perc", "gauge", "Share of the cache that running requests hold, 1 is all.", used);
        page.one("prompt_tokens_total", "counter", "Tokens of prompts.", stats.prompt_tokens as f64);
        page.one("generation_tokens_total", "counter", "Generated tokens.", stats.generated_tokens as f64);
        page.one("prefix_cache_queries_total", "counter", "Tokens looked up in the cache.", stats.prompt_tokens as f64);
        page.one("prefix_cache_hits_total", "counter", "Tokens found in the cache.", stats.cached_tokens as f64);
        page.one("requests_ended_total", "counter", "Requests that ended, answered or not.", stats.ended as f64);
        page.one("requests_failed_total", "counter", "Requests that failed.", stats.failed as f64);
        page.one("requests_cancelled_total", "counter", "Requests that were taken back.", stats.cancelled as f64);
        page.one("open_connections", "gauge", "Open connections.", connections as f64);
        page.head("request_success_total", "counter", "Requests that were answered, by how the answer ended.");
        for (reason, count) in [("stop", &self.stopped), ("length", &self.length)] {
            let labels = format!(",finished_reason=\"{reason}\"");
            page.line("request_success_total", &labels, count.load(Ordering::Relaxed) as f64);
        }
        page.head("http_responses_total", "counter", "Responses, by route and status.");
        for ((route, status), &count) in &*self.responses.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) {
            page.line("http_responses_total", &format!(",route=\"{route}\",status=\"{status}\""), count as f64);
        }
        for (name, help, histogram) in [
            ("request_queue_time_seconds", "From a request to its place among the running.", &self.queued),
            ("time_to_first_token_seconds", "From a request to the first text of its answer.", &self.first),
            ("inter_token_latency_seconds", "Between two pieces of an answer.", &self.between),
            ("request_time_per_output_token_seconds", "A request's time by token, the first left out.", &self.each),
            ("e2e_request_latency_seconds", "From a request to the end of its answer.", &self.whole),
        ] {
            page.histogram(name, help, histogram);
        }
        page.text
    }
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, counts: (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect(), micros: AtomicU64::new(0) }
    }

    fn add(&self, time: Duration) {
        let at = self.bounds.partition_point(|&bound| bound < time.as_secs_f64());
        self.counts[at].fetch_add(1, Ordering::Relaxed);
        self.micros.fetch_add(time.as_micros() as u64, Ordering::Relaxed);
    }
}

struct Page {
    text: String,
    model: String,
}

impl Page {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = write!(self.text, "# HELP vora:{name} {help}\n# TYPE vora:{name} {kind}\n");
    }

    fn line(&mut self, name: &str, labels: &str, value: f64) {
        let _ = writeln!(self.text, "vora:{name}{{model_name=\"{}\"{labels}}} {value}", self.model);
    }

    fn one(&mut self, name: &str, kind: &str, help: &str, value: f64) {
        self.head(name, kind, help);
        self.line(name, "", value);
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) {
        self.head(name, "histogram", help);
        let bounds = histogram.bounds.iter().map(ToString::to_string).chain(["+Inf".to_owned()]);
        let mut sum = 0;
        for (bound, count) in bounds.zip(&histogram.counts) {
            sum += count.load(Ordering::Relaxed);
            self.line(&format!("{name}_bucket"), &format!(",le=\"{bound}\""), sum as f64);
        }
        self.line(&format!("{name}_sum"), "", histogram.micros.load(Ordering::Relaxed) as f64 / 1e6);
        self.line(&format!("{name}_count"), "", sum as f64);
    }
}

fn escape(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
