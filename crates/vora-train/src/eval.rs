//! Exact match by kind of question, always beside the blind control: the same questions about another picture.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use comfy_table::{CellAlignment, Table, presets};
use serde::{Deserialize, Serialize};
use tch::Tensor;
use vora_data::{Batch, Loader, LoaderConfig};
use vora_vision::Pixels;

use crate::data::HeldOut;
use crate::metrics::Progress;
use crate::student::{DeviceBatch, Student};

/// How many questions of one kind were answered token for token.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// Questions asked.
    pub n: u64,
    /// Share answered exactly.
    pub exact_match: f64,
    /// The same with another question's picture: what can be guessed. Absent where there was no other picture.
    pub blind_exact_match: Option<f64>,
}

/// Split -> kind of question -> score; the kind `all` is every question of the split.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EvalReport(pub BTreeMap<String, BTreeMap<String, Score>>);

impl EvalReport {
    /// Writes `eval.json`.
    pub fn save(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)?;
        vora_torch::safetensors::write_bytes(path, text.as_bytes())
    }

    /// Reads `eval.json`.
    pub fn open(path: &Path) -> Result<Self> {
        let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("{} is not a report", path.display()))
    }

    /// The score of all questions of a split.
    pub fn all(&self, split: &str) -> Option<Score> {
        self.0.get(split)?.get("all").copied()
    }
}

impl fmt::Display for EvalReport {
    /// A table with a row a kind and split.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new();
        table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_header(["split", "kind", "n", "exact match", "blind"]);
        for (split, kinds) in &self.0 {
            let all = kinds.iter().filter(|(kind, _)| *kind == "all");
            for (kind, score) in kinds.iter().filter(|(kind, _)| *kind != "all").chain(all) {
                let blind = score.blind_exact_match.map_or(String::from("-"), |share| format!("{share:.3}"));
                table.add_row([split, kind, &score.n.to_string(), &format!("{:.3}", score.exact_match), &blind]);
            }
        }
        for column in 2..5 {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        write!(f, "{table}")
    }
}

/// Counts answers of one split.
#[derive(Debug, Default)]
pub struct Tally {
    seeing: BTreeMap<String, [u64; 2]>, // asked, right
    blind: BTreeMap<String, [u64; 2]>,
}

impl Tally {
    /// Counts one answer.
    pub fn add(&mut self, kind: &str, right: bool) {
        Self::count(&mut self.seeing, kind, right);
    }

    /// Counts one answer that was given about another picture.
    pub fn add_blind(&mut self, kind: &str, right: bool) {
        Self::count(&mut self.blind, kind, right);
    }

    fn count(counts: &mut BTreeMap<String, [u64; 2]>, kind: &str, right: bool) {
        for kind in [kind, "all"] {
            let count = counts.entry(kind.to_owned()).or_default();
            count[0] += 1;
            count[1] += u64::from(right);
        }
    }

    /// The scores by kind.
    pub fn scores(&self) -> BTreeMap<String, Score> {
        let share = |[n, right]: [u64; 2]| right as f64 / n as f64;
        let score = |(kind, &count): (&String, &[u64; 2])| {
            let blind_exact_match = self.blind.get(kind).copied().map(share);
            (kind.clone(), Score { n: count[0], exact_match: share(count), blind_exact_match })
        };
        self.seeing.iter().map(score).collect()
    }
}

/// Asks every question of every split, with its picture and with another one; none where `stop` was set meanwhile.
pub fn evaluate(
    student: &Student,
    splits: &[HeldOut],
    batch_size: usize,
    num_workers: usize,
    stop: &AtomicBool,
    progress: &mut dyn Progress,
) -> Result<Option<EvalReport>> {
    let total = splits.iter().map(|split| (split.samples as usize).div_ceil(batch_size)).sum();
    let mut done = 0;
    let mut report = EvalReport::default();
    for split in splits {
        let config = LoaderConfig { batch_size, num_workers, end: Some(split.samples), ..LoaderConfig::default() };
        let mut tally = Tally::default();
        for batch in Loader::new(split.source.clone(), config)? {
            if stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let mut batch = batch?;
            for (kind, right) in answers(student, &batch)? {
                tally.add(&kind, right);
            }
            let is_blind = show_other_pictures(&mut batch);
            for ((kind, right), _) in
                answers(student, &batch)?.into_iter().zip(is_blind).filter(|(_, is_blind)| *is_blind)
            {
                tally.add_blind(&kind, right);
            }
            done += 1;
            progress.evaluating(done, total);
        }
        report.0.insert(split.name.clone(), tally.scores());
    }
    Ok(Some(report))
}

/// Each question's kind and whether it is answered right: all tokens of its answer are the most likely ones.
///
/// Under teacher forcing that is so exactly when greedy decoding gives the answer.
fn answers(student: &Student, batch: &Batch) -> Result<Vec<(String, bool)>> {
    let uploaded = DeviceBatch::new(batch, student.device());
    let right = tch::no_grad(|| right_tokens(&student.answer_logits(&uploaded)?, &uploaded.targets))?;
    Ok(batch.questions().map(|(question, tokens)| (question.kind.clone(), right[tokens].iter().all(|&r| r))).collect())
}

/// Whether the most likely token is the right one at each position: `[n, vocab]`, `[n]` -> n.
fn right_tokens(logits: &Tensor, targets: &Tensor) -> Result<Vec<bool>> {
    Vec::<bool>::try_from(logits.argmax(-1, false).eq_tensor(targets)).context("reading which tokens are right")
}

/// Gives every picture's place to a picture of the same size that is another sample's and shows something else. For
/// each question, whether all its pictures were exchanged.
fn show_other_pictures(batch: &mut Batch) -> Vec<bool> {
    let owners: Vec<usize> = batch
        .samples
        .iter()
        .enumerate()
        .flat_map(|(row, sample)| std::iter::repeat_n(row, sample.num_images))
        .collect();
    let n = batch.images.len();
    let other = |i: usize| {
        let picture = &batch.images[i];
        let fits = |j: &usize| {
            let other = &batch.images[*j];
            owners[*j] != owners[i]
                && (other.height, other.width) == (picture.height, picture.width)
                && other.data != picture.data
        };
        (i + 1..i + n).map(|j| j % n).find(fits)
    };
    let others: Vec<Option<usize>> = (0..n).map(other).collect();
    let images: Vec<Pixels> = others.iter().enumerate().map(|(i, j)| batch.images[j.unwrap_or(i)].clone()).collect();
    batch.images = images;
    let is_blind = |row: usize| {
        let mut own = others.iter().zip(&owners).filter(|(_, owner)| **owner == row).peekable();
        own.peek().is_some() && own.all(|(other, _)| other.is_some())
    };
    let samples = batch.samples.iter().enumerate();
    samples.flat_map(|(row, sample)| std::iter::repeat_n(is_blind(row), sample.questions.len())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_by_kind_and_over_all() {
        let mut tally = Tally::default();
        for (kind, right) in [("colour", true), ("colour", false), ("shape", true), ("shape", true)] {
            tally.add(kind, right);
        }
        tally.add_blind("colour", false);
        let scores = tally.scores();
        assert_eq!(scores["colour"], Score { n: 2, exact_match: 0.5, blind_exact_match: Some(0.0) });
        assert_eq!(scores["shape"], Score { n: 2, exact_match: 1.0, blind_exact_match: None });
        assert_eq!(scores["all"], Score { n: 4, exact_match: 0.75, blind_exact_match: Some(0.0) });
    }

    #[test]
    fn the_report_is_a_file_and_a_table() {
        let mut tally = Tally::default();
        tally.add("where", true);
        tally.add_blind("where", false);
        tally.add("colour", false);
        let report = EvalReport([("test".to_owned(), tally.scores())].into());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("eval.json");
        report.save(&path).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!(json["test"]["where"], serde_json::json!({"n": 1, "exact_match": 1.0, "blind_exact_match": 0.0}));
        assert_eq!(EvalReport::open(&path).unwrap(), report);
        let table = report.to_string();
        let rows: Vec<&str> = table.lines().filter(|line| line.contains("test")).collect();
        assert!(rows.len() == 3 && rows[2].contains("all") && rows[2].contains("0.500"), "{table}");
    }

    fn sample(id: &str, pictures: &[f32], questions: usize) -> vora_data::Sample {
        let question = vora_data::QuestionSpan {
            kind: "turn".into(),
            question: String::new(),
            answer: String::new(),
            tokens: 0..1,
        };
        vora_data::Sample {
            id: id.into(),
            input_ids: vec![1],
            targets: vec![2],
            spans: vec![vora_llm::Span::text(1)],
            images: pictures.iter().map(|&p| Pixels { data: vec![p; 3], height: 1, width: 1 }).collect(),
            questions: vec![question; questions],
            cut_answers: 0,
            notes: Vec::new(),
        }
    }

    #[test]
    fn the_blind_control_sees_another_picture() {
        let samples = vec![
            sample("a", &[1.0], 2),
            sample("b", &[1.0], 1), // looks like a
            sample("c", &[2.0, 3.0], 1),
            sample("d", &[], 1),
        ];
        let mut batch = vora_data::collate(samples, 0);
        assert_eq!(show_other_pictures(&mut batch), [true, true, true, true, false]);
        let shown: Vec<f32> = batch.images.iter().map(|p| p.data[0]).collect();
        assert_eq!(shown, [2.0, 2.0, 1.0, 1.0]);
        let mut alone = vora_data::collate(vec![sample("a", &[1.0], 1)], 0);
        assert_eq!(show_other_pictures(&mut alone), [false]);
    }

    #[test]
    fn the_likeliest_token_counts() {
        let logits = Tensor::from_slice2(&[[0.1f32, 0.9, 0.0], [0.5, 0.4, 0.1]]);
        assert_eq!(right_tokens(&logits, &Tensor::from_slice(&[1i64, 1])).unwrap(), [true, false]);
    }
}
