//! What a budget of image tokens costs, and what it gives: the same questions with another `max_image_tokens` each time.

use std::fmt;

use comfy_table::{CellAlignment, Table, presets};
use serde_json::{Value, json};

use crate::report::{Answered, Report};

/// The answers within one budget.
#[derive(Debug)]
pub struct Budget {
    max_image_tokens: u32,
    image_tokens: f64, // a question, on the mean
    seconds: f64,      // a question, on the mean
    left_out: usize,   // questions about pictures that no such budget holds
    report: Report,
}

/// Those of several, in the order in which they were asked.
#[derive(Debug, Default)]
pub struct Budgets(Vec<Budget>);

/// A curve over budgets, and what it is called.
pub(crate) type Curve = (&'static str, Vec<(f64, f64)>);

impl Budgets {
    /// Takes what was answered within one more, and how many questions could not be asked.
    pub fn push(&mut self, max_image_tokens: u32, answered: &[Answered], left_out: usize, report: Report) {
        let mean = |of: &dyn Fn(&Answered) -> f64| answered.iter().map(of).sum::<f64>() / answered.len().max(1) as f64;
        let image_tokens = mean(&|one| one.image_tokens as f64);
        let seconds = mean(&|one| one.seconds);
        self.0.push(Budget { max_image_tokens, image_tokens, seconds, left_out, report });
    }

    /// For each `{max_image_tokens, image_tokens, seconds, left_out, scores}`: the mean of what a question took, how many were
    /// left out, and [`Report::scores`].
    pub fn json(&self) -> Value {
        let of = |budget: &Budget| {
            json!({
                "max_image_tokens": budget.max_image_tokens,
                "image_tokens": budget.image_tokens,
                "seconds": budget.seconds,
                "left_out": budget.left_out,
                "scores": budget.report.scores(),
            })
        };
        self.0.iter().map(of).collect()
    }

    /// The task's first score, that of the blind control, and the seconds of a question, each over `max_image_tokens`.
    pub fn curves(&self) -> [Curve; 3] {
        let over = |value: &dyn Fn(&Budget) -> Option<f64>| {
            self.0.iter().filter_map(|budget| Some((f64::from(budget.max_image_tokens), value(budget)?))).collect()
        };
        let name = self.0.first().map_or("", |budget| budget.report.headline().0);
        [
            (name, over(&|budget| Some(budget.report.headline().1))),
            ("wrong picture", over(&|budget| budget.report.headline().2)),
            ("seconds", over(&|budget| Some(budget.seconds))),
        ]
    }
}

impl fmt::Display for Budgets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let score = self.0.first().map_or("score", |budget| budget.report.headline().0);
        let mut table = Table::new();
        let header = ["max_image_tokens", "image tokens", "seconds", score, "blind"];
        table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_header(header);
        for budget in &self.0 {
            let (_, score, blind) = budget.report.headline();
            table.add_row([
                budget.max_image_tokens.to_string(),
                format!("{:.1}", budget.image_tokens),
                format!("{:.3}", budget.seconds),
                format!("{score:.3}"),
                blind.map_or(String::from("-"), |blind| format!("{blind:.3}")),
            ]);
        }
        for column in table.column_iter_mut() {
            column.set_cell_alignment(CellAlignment::Right);
        }
        write!(f, "{table}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::question::Question;
    use crate::task::Task;

    #[test]
    fn each_budget_has_its_cost_and_its_scores() {
        let answered = |answer: &str, image_tokens| Answered {
            question: Question {
                id: String::new(),
                kind: Some("colour".to_owned()),
                messages: Vec::new(),
                pictures: Vec::new(),
                references: vec!["red".to_owned()],
                captions: Vec::new(),
                has_question_key: false,
            },
            answer: answer.to_owned(),
            blind: Some("blue".to_owned()),
            image_tokens,
            seconds: 0.5,
        };
        let mut budgets = Budgets::default();
        for (max, answers) in
            [(16, [answered("red", 16), answered("green", 9)]), (4, [answered("blue", 4), answered("", 4)])]
        {
            budgets.push(max, &answers, 3, Report::new(Task::Exact, &answers).unwrap());
        }
        let json = budgets.json();
        assert_eq!((&json[0]["max_image_tokens"], &json[0]["image_tokens"]), (&json!(16), &json!(12.5)));
        assert_eq!(json[1]["left_out"], 3);
        assert_eq!((&json[1]["scores"]["all"]["exact_match"], &json[1]["seconds"]), (&json!(0.0), &json!(0.5)));
        let [(name, score), (_, blind), (_, seconds)] = budgets.curves();
        assert_eq!((name, score), ("exact_match", vec![(16.0, 0.5), (4.0, 0.0)]));
        assert_eq!((blind[0], seconds[1]), ((16.0, 0.0), (4.0, 0.5)));
        let table = budgets.to_string();
        assert!(table.contains("12.5") && table.contains("0.500") && table.contains("exact_match"), "{table}");
    }
}
