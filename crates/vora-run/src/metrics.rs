//! What a run tells about itself: `metrics.jsonl`, a line a step.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::eval::EvalReport;

/// One optimizer step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Counted from 1.
    pub step: u64,
    /// The sum that was trained on: language loss plus weighted distillation loss and text anchor.
    pub loss: f64,
    /// Cross-entropy per supervised token, in nats; in a run with `loss: dpo` DPO's loss, mean over the step's pairs.
    pub loss_lm: f64,
    /// Cosine loss, mean over the blocks; absent without a teacher or a picture.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_distill: Option<f64>,
    /// What that was multiplied with in this step; absent where the run has no `distill.weight_schedule`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distill_weight: Option<f64>,
    /// The cosine loss of each block, whose mean is `loss_distill`; empty where that is absent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub distill_blocks: Vec<f64>,
    /// The cosine loss of the best answer that looks at no picture.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub baseline_distill: Option<f64>,
    /// The divergence from the frozen LLM on the anchor's texts, mean over their tokens, in nats; absent in steps without
    /// any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_anchor: Option<f64>,
    /// What DPO makes of the step's pairs; absent in runs with another loss.
    #[serde(flatten, default, skip_serializing_if = "Option::is_none")]
    pub rewards: Option<RewardMetrics>,
    /// The run's learning rate at this step; groups with their own move in proportion.
    pub lr: f64,
    /// 2-norm of the gradient before it was clipped.
    pub grad_norm: f64,
    /// Samples (pictures with their questions) a second.
    pub samples_per_second: f64,
    /// Tokens a second, image tokens included, padding not.
    pub tokens_per_second: f64,
    /// Share of the rows' places that are padding.
    #[serde(default)]
    pub padding_share: f64,
    /// Samples of the step that lost turns at their end, to fit into `max_seq_len`.
    #[serde(default)]
    pub truncated: u64,
    /// Samples left out on the way to this step as not even their first answer fits.
    #[serde(default)]
    pub too_long: u64,
    /// Seconds that the step waited for data.
    pub data_wait: f64,
    /// Bytes of memory held: on the CPU the process's, mapped weights included; on a GPU its tensors' there. Absent where
    /// the system does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<u64>,
    /// Steps so far whose loss or gradient was not finite, and that changed no weight.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub skipped_steps: u64,
    /// Seconds since the run began, pauses between runs left out.
    pub seconds: f64,
}

/// DPO's implicit rewards, means over the pairs of a step, by TRL's names: `beta (log policy - log reference)` of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RewardMetrics {
    /// Of the chosen answers.
    #[serde(rename = "rewards/chosen")]
    pub chosen: f64,
    /// Of the rejected answers.
    #[serde(rename = "rewards/rejected")]
    pub rejected: f64,
    /// Share of the pairs whose chosen answer has the higher one.
    #[serde(rename = "rewards/accuracies")]
    pub accuracies: f64,
    /// How much higher those of the chosen answers are.
    #[serde(rename = "rewards/margins")]
    pub margins: f64,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// An evaluation during a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalMetrics {
    /// The step it followed.
    pub step: u64,
    /// The report.
    pub eval: EvalReport,
}

/// Something that a step did which it should not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum EventKind {
    /// Its loss or gradient was not finite: no weight was changed, and it has no line of its own.
    SkippedStep,
    /// Its loss lies far above the last ones; it was taken like any other.
    LossSpike,
}

/// An event, with what it happened on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventMetrics {
    /// The step.
    pub step: u64,
    /// What happened.
    pub event: EventKind,
    /// The same in words, with its numbers.
    pub message: String,
    /// The ids of the samples that it happened on.
    pub samples: Vec<String>,
}

/// One line of `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a line of a step, an evaluation or an event")]
pub enum Line {
    /// A line with `eval` in it.
    Eval(EvalMetrics),
    /// A line with `event` in it.
    Event(EventMetrics),
    /// Any other line.
    Step(StepMetrics),
}

/// What one of several processes found of a step: a line of its `metrics-rank-N.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RankMetrics {
    /// The step, counted from 1.
    pub step: u64,
    /// The process, counted from 0.
    pub rank: u64,
    /// Language loss plus weighted distillation loss of the samples of this process alone.
    pub loss: f64,
    /// The language loss, mean over the supervised tokens (or pairs) of this process.
    pub loss_lm: f64,
    /// The cosine loss, mean over the image tokens of this process; absent without a teacher or a picture.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_distill: Option<f64>,
    /// Samples of this process.
    pub samples: u64,
    /// Their tokens, image tokens included.
    pub tokens: u64,
    /// Seconds that the step took here.
    pub step_time: f64,
    /// Of them, those in which it waited for other processes and for the network; not what went on beside a backward pass.
    pub wait: f64,
    /// Of them, those in which it waited for data.
    pub data_wait: f64,
    /// Bytes of memory held, as in [`StepMetrics::memory`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<u64>,
    /// The most that it was so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_memory: Option<u64>,
}

impl RankMetrics {
    /// The name of the file of a process's lines.
    pub fn file_name(rank: usize) -> String {
        format!("{RANK_METRICS}{rank}.jsonl")
    }
}

/// What the names of such files begin with.
pub(crate) const RANK_METRICS: &str = "metrics-rank-";

/// A line of a log, which knows its step.
pub trait Logged: Serialize + DeserializeOwned {
    /// Whether a run that goes on after `step` has this in its past.
    fn is_before(&self, step: u64) -> bool;
}

impl Logged for Line {
    /// The evaluation that follows a checkpoint is made again.
    fn is_before(&self, step: u64) -> bool {
        match self {
            Self::Eval(eval) => eval.step < step,
            Self::Event(event) => event.step <= step,
            Self::Step(metrics) => metrics.step <= step,
        }
    }
}

impl Logged for RankMetrics {
    fn is_before(&self, step: u64) -> bool {
        self.step <= step
    }
}

/// The open `metrics.jsonl` of a run, or that of one of its processes.
#[derive(Debug)]
pub struct MetricsLog<L = Line> {
    path: PathBuf,
    file: File,
    lines: PhantomData<L>,
}

impl<L: Logged> MetricsLog<L> {
    /// Opens the log of a run that goes on after `step` (0: from its start). Lines of later steps, which the run will
    /// write again, and a line that a crash left half written are cut off.
    ///
    /// # Errors
    /// Where the file cannot be opened, read or cut.
    pub fn open(path: &Path, step: u64) -> Result<Self> {
        let what = || format!("cannot open {}", path.display());
        let mut options = OpenOptions::new();
        let mut file = options.read(true).write(true).create(true).truncate(false).open(path).with_context(what)?;
        let text = std::fs::read_to_string(path).with_context(what)?;
        let keep: usize = text
            .split_inclusive('\n')
            .take_while(|line| {
                line.ends_with('\n') && serde_json::from_str::<L>(line).is_ok_and(|line| line.is_before(step))
            })
            .map(str::len)
            .sum();
        file.set_len(keep as u64).with_context(what)?;
        file.seek(SeekFrom::End(0)).with_context(what)?;
        Ok(Self { path: path.to_owned(), file, lines: PhantomData })
    }

    /// Writes one line.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub fn write(&mut self, line: &L) -> Result<()> {
        let mut text = serde_json::to_string(line)?;
        text.push('\n');
        self.file.write_all(text.as_bytes()).with_context(|| format!("cannot write {}", self.path.display()))
    }
}

impl MetricsLog {
    /// All lines of a run's log.
    ///
    /// # Errors
    /// Where the file cannot be read, and the number of the first line that is none of a log.
    pub fn read(path: &Path) -> Result<Vec<Line>> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let line = |(i, text)| {
            serde_json::from_str(text).with_context(|| format!("{}:{} is not a line of metrics", path.display(), i + 1))
        };
        text.lines().enumerate().map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: u64) -> Line {
        Line::Step(StepMetrics {
            step,
            loss: 1.5,
            loss_lm: 1.0,
            loss_distill: Some(0.5),
            distill_weight: None,
            distill_blocks: vec![0.4, 0.6],
            baseline_distill: None,
            loss_anchor: None,
            rewards: None,
            lr: 1e-3,
            grad_norm: 0.1,
            samples_per_second: 10.0,
            tokens_per_second: 100.0,
            padding_share: 0.25,
            truncated: 1,
            too_long: 2,
            data_wait: 0.0,
            memory: None,
            skipped_steps: 0,
            seconds: 1.0,
        })
    }

    #[test]
    fn a_resumed_log_goes_on_where_the_checkpoint_was() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut log = MetricsLog::open(&path, 0).unwrap();
        for i in 1..=5 {
            log.write(&step(i)).unwrap();
        }
        log.write(&Line::Eval(EvalMetrics { step: 3, eval: EvalReport::default() })).unwrap();
        std::fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"step\": 6, \"lo").unwrap();

        let mut log = MetricsLog::open(&path, 3).unwrap();
        log.write(&step(4)).unwrap();
        let lines = MetricsLog::read(&path).unwrap();
        assert_eq!(lines, [step(1), step(2), step(3), step(4)]);

        MetricsLog::<Line>::open(&path, 0).unwrap();
        assert!(MetricsLog::read(&path).unwrap().is_empty());
    }

    #[test]
    fn an_eval_line_is_told_from_a_step() {
        let line = Line::Eval(EvalMetrics { step: 3, eval: EvalReport::default() });
        assert_eq!(serde_json::from_str::<Line>(&serde_json::to_string(&line).unwrap()).unwrap(), line);
        let text = serde_json::to_string(&step(2)).unwrap();
        assert!(text.contains("\"loss_lm\":1.0") && !text.contains("baseline"), "{text}");
        assert_eq!(serde_json::from_str::<Line>(&text).unwrap(), step(2));
    }

    #[test]
    fn rewards_have_the_names_of_trl() {
        let Line::Step(mut metrics) = step(2) else { panic!("a step") };
        metrics.rewards = Some(RewardMetrics { chosen: 0.5, rejected: -0.25, accuracies: 1.0, margins: 0.75 });
        let text = serde_json::to_string(&metrics).unwrap();
        assert!(text.contains(r#""rewards/chosen":0.5,"rewards/rejected":-0.25,"rewards/accuracies":1.0"#), "{text}");
        assert_eq!(serde_json::from_str::<Line>(&text).unwrap(), Line::Step(metrics));
    }

    #[test]
    fn an_event_is_told_from_a_step() {
        let line = Line::Event(EventMetrics {
            step: 3,
            event: EventKind::SkippedStep,
            message: "step 3 is not finite".into(),
            samples: vec!["a".into()],
        });
        let text = serde_json::to_string(&line).unwrap();
        assert!(text.contains(r#""event":"skipped_step""#), "{text}");
        assert_eq!(serde_json::from_str::<Line>(&text).unwrap(), line);
    }

    #[test]
    fn a_broken_line_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        std::fs::write(&path, "{}\n").unwrap();
        let error = MetricsLog::read(&path).unwrap_err().to_string();
        assert!(error.contains("metrics.jsonl:1 is not a line of metrics"), "{error}");
    }
}
