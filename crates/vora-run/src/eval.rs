//! `eval.json`: exact match by question type, beside the blind control.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use anyhow::{Context, Result};
use comfy_table::{CellAlignment, Table, presets};
use serde::{Deserialize, Serialize};

use crate::interval::Interval;

/// How many questions of one type were answered token for token; of descriptions of scenes, told the same.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// Questions asked.
    pub n: u64,
    /// Share answered exactly.
    pub exact_match: f64,
    /// The same with another question's picture: what can be guessed. Absent where there was no other picture.
    pub blind_exact_match: Option<f64>,
}

impl Score {
    /// The 95% interval of the share answered exactly.
    pub fn interval(&self) -> Interval {
        Interval::of_share(self.exact_match, self.n)
    }
}

/// Split -> question type -> score; the type `all` is every question of the split.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EvalReport(pub BTreeMap<String, BTreeMap<String, Score>>);

impl EvalReport {
    /// Writes `eval.json`.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)?;
        vora_files::write_bytes(path, text.as_bytes())
    }

    /// Reads `eval.json`.
    ///
    /// # Errors
    /// Where the file cannot be read or is no report.
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
    /// A table with a row for each split and question type.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new();
        table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_header([
            "split",
            "kind",
            "n",
            "exact match",
            "95%",
            "blind",
        ]);
        for (split, kinds) in &self.0 {
            let all = kinds.iter().filter(|(kind, _)| *kind == "all");
            for (kind, score) in kinds.iter().filter(|(kind, _)| *kind != "all").chain(all) {
                let blind = score.blind_exact_match.map_or(String::from("-"), |share| format!("{share:.3}"));
                let [n, exact] = [score.n.to_string(), format!("{:.3}", score.exact_match)];
                table.add_row([split, kind, &n, &exact, &score.interval().to_string(), &blind]);
            }
        }
        for column in 2..6 {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        write!(f, "{table}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_is_a_file_and_a_table() {
        let score = |n, exact_match, blind_exact_match| Score { n, exact_match, blind_exact_match };
        let scores =
            [("where", score(1, 1.0, Some(0.0))), ("colour", score(1, 0.0, None)), ("all", score(2, 0.5, Some(0.0)))];
        let scores = scores.map(|(question_type, score)| (question_type.to_owned(), score)).into();
        let report = EvalReport([("test".to_owned(), scores)].into());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("eval.json");
        report.save(&path).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!(json["test"]["where"], serde_json::json!({"n": 1, "exact_match": 1.0, "blind_exact_match": 0.0}));
        assert_eq!(EvalReport::open(&path).unwrap(), report);
        let table = report.to_string();
        let rows: Vec<&str> = table.lines().filter(|line| line.contains("test")).collect();
        assert!(rows.len() == 3 && rows[2].contains("all") && rows[2].contains("0.500"), "{table}");
        assert!(rows[2].contains("0.095 to 0.905"), "{table}");
    }
}
