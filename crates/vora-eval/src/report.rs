//! What came of the questions: scores of all and by question type, beside those of the blind control; a table and JSON.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::Result;
use comfy_table::{CellAlignment, Table, presets};
use serde_json::{Map, Value, json};
use vora_data::short_name;
use vora_run::interval::Interval;

use crate::question::Question;
use crate::scores::{TokenizedCaption, YesNo, bleu, cider, is_right, rouge_l, says_yes, vqa_accuracy};
use crate::task::Task;

/// A question that was answered.
#[derive(Debug)]
#[non_exhaustive]
pub struct Answered {
    /// The question.
    pub question: Question,
    /// What the model said.
    pub answer: String,
    /// The answer to the same question about other pictures, where there are any.
    pub blind: Option<String>,
    /// Tokens that its pictures became.
    pub image_tokens: i64,
    /// Seconds until it was answered, its share of those of a batch.
    pub seconds: f64,
}

/// Scores by name, of a set, and that of each question.
struct Scored {
    all: Vec<(&'static str, f64)>,
    each: Vec<f64>,
}

/// What one question type came to.
#[derive(Debug)]
struct Row {
    kind: String,
    n: usize,
    name: &'static str,
    score: f64,
    blind: Option<f64>,
}

/// All that an evaluation found.
#[derive(Debug)]
pub struct Report {
    task: Task,
    rows: Vec<Row>,
    answers: Vec<Value>,
}

impl Report {
    /// Scores every answer; the type `all` comes last.
    ///
    /// # Errors
    /// Where an expected answer is not one of the task.
    pub fn new(task: Task, answered: &[Answered]) -> Result<Self> {
        let mut kinds: BTreeMap<&str, Vec<&Answered>> = BTreeMap::new();
        for one in answered {
            if let Some(kind) = &one.question.kind {
                kinds.entry(kind).or_default().push(one);
            }
        }
        let (mut rows, mut each) = (Vec::new(), Vec::new());
        let all: Vec<&Answered> = answered.iter().collect();
        for (kind, answered) in kinds.into_iter().chain([("all", all)]) {
            let seeing = score(task, answered.iter().map(|one| (one.answer.as_str(), &one.question)))?;
            let with_blind: Vec<_> =
                answered.iter().filter_map(|one| Some((one.blind.as_deref()?, &one.question))).collect();
            let blind = score(task, with_blind.iter().copied())?;
            for (idx, (name, score)) in seeing.all.into_iter().enumerate() {
                let blind = (!with_blind.is_empty()).then(|| blind.all[idx].1);
                rows.push(Row { kind: kind.to_owned(), n: answered.len(), name, score, blind });
            }
            each = seeing.each; // in the end, those of all
        }
        let answers = answered.iter().zip(each).map(|(Answered { question, answer, blind, .. }, score)| {
            json!({
                "id": question.id,
                "kind": question.kind,
                "pictures": question.pictures.iter().map(|name| short_name(name)).collect::<Vec<_>>(),
                "question": question.text(),
                "references": question.references,
                "answer": answer,
                "blind_answer": blind,
                "score": score,
            })
        });
        Ok(Self { task, rows, answers: answers.collect() })
    }

    /// `{kind: {n, score, blind_score}}` for every score of the task, as in a run's `eval.json`.
    pub fn scores(&self) -> Value {
        let mut kinds: Map<String, Value> = Map::new();
        for row in &self.rows {
            let kind = kinds.entry(&row.kind).or_insert_with(|| json!({"n": row.n}));
            kind[row.name] = row.score.into();
            kind[format!("blind_{}", row.name)] = row.blind.into();
        }
        kinds.into()
    }

    /// The task's first score over all questions: its name, its value, and that of the blind control.
    pub fn headline(&self) -> (&'static str, f64, Option<f64>) {
        let all = self.rows.iter().find(|row| row.kind == "all");
        all.map_or(("", 0.0, None), |row| (row.name, row.score, row.blind))
    }

    /// Every question with its answers, the expected, the given, the blind.
    pub fn answers(&self) -> &[Value] {
        &self.answers
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new();
        table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_header([
            self.task.name(),
            "n",
            "score",
            "",
            "95%",
            "blind",
        ]);
        for row in &self.rows {
            let blind = row.blind.map_or(String::from("-"), |blind| format!("{blind:.3}"));
            let is_share = ["exact_match", "accuracy"].contains(&row.name);
            let interval = is_share.then(|| Interval::of_share(row.score, row.n as u64).to_string());
            let [n, score] = [row.n.to_string(), format!("{:.3}", row.score)];
            table.add_row([&row.kind, &n, row.name, &score, interval.as_deref().unwrap_or(""), &blind]);
        }
        for column in [1, 3, 4, 5] {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        write!(f, "{table}")
    }
}

/// The scores of answers by what is expected.
fn score<'a>(task: Task, answers: impl Iterator<Item = (&'a str, &'a Question)>) -> Result<Scored> {
    let mean = |each: &[f64]| each.iter().sum::<f64>() / each.len().max(1) as f64;
    Ok(match task {
        Task::Exact => {
            let right = |(answer, q): (&str, &Question)| is_right(q.kind.as_deref(), answer, &q.references);
            let each: Vec<f64> = answers.map(|one| f64::from(u8::from(right(one)))).collect();
            Scored { all: vec![("exact_match", mean(&each))], each }
        }
        Task::Vqa => {
            let each: Vec<f64> = answers.map(|(answer, q)| vqa_accuracy(answer, &q.references)).collect();
            Scored { all: vec![("vqa_accuracy", mean(&each))], each }
        }
        Task::Yesno => {
            let pairs =
                answers.map(|(answer, q)| Ok((says_yes(answer), q.expects_yes()?))).collect::<Result<Vec<_>>>()?;
            let each = pairs.iter().map(|(said, is)| f64::from(u8::from(said == is))).collect();
            let YesNo { accuracy, precision, recall, f1, yes_share } = YesNo::of(&pairs).unwrap_or_default();
            let names = ["accuracy", "precision", "recall", "f1", "yes_share"];
            Scored { all: names.into_iter().zip([accuracy, precision, recall, f1, yes_share]).collect(), each }
        }
        Task::Caption => {
            let captions: Vec<_> = answers.map(|(answer, q)| TokenizedCaption::new(answer, &q.references)).collect();
            let each = cider(&captions);
            let rouge: Vec<f64> = captions.iter().map(rouge_l).collect();
            let names = ["bleu_1", "bleu_2", "bleu_3", "bleu_4"];
            let mut all: Vec<_> = names.into_iter().zip(bleu(&captions)).collect();
            all.extend([("rouge_l", mean(&rouge)), ("cider", mean(&each))]);
            Scored { all, each }
        }
    })
}
