//! A cell of the design: what is varied, and how its trainings did.

use std::collections::BTreeSet;

use vora_run::eval::EvalReport;

/// What is varied.
#[derive(Debug)]
pub struct Factor {
    /// Its name.
    pub name: &'static str,
    /// The value that it is compared with, and the other one.
    pub values: [Value; 2],
}

/// A value of a factor.
#[derive(Debug)]
pub struct Value {
    /// Its name.
    pub name: &'static str,
    /// The setting that makes it, `KEY=VALUE`; none where the run file does.
    pub set: Option<&'static str>,
}

/// What is varied, each factor with each.
pub const FACTORS: [Factor; 3] = [
    Factor {
        name: "vision attention",
        values: [
            Value { name: "causal", set: Some("model.vision_attention=causal") },
            Value { name: "bidirectional", set: Some("model.vision_attention=bidirectional") },
        ],
    },
    Factor {
        name: "distillation",
        // Teacher and patch embedding stay, so that nothing else differs.
        values: [
            Value { name: "not distilled", set: Some("distill.weight=0") },
            Value { name: "distilled", set: None },
        ],
    },
    Factor {
        name: "adapters act on",
        values: [
            Value { name: "all tokens", set: Some("model.lora.acts_on=all") },
            Value { name: "image tokens", set: Some("model.lora.acts_on=image_tokens") },
        ],
    },
];

/// Which value each factor has.
pub type Levels = [usize; 3];

/// `causal-distilled-all_tokens`
pub fn folder(levels: Levels) -> String {
    names(levels).join("-").replace(' ', "_")
}

/// The values of all factors.
fn names(levels: Levels) -> [&'static str; 3] {
    std::array::from_fn(|factor| FACTORS[factor].values[levels[factor]].name)
}

/// One cell of the design, and its trainings.
#[derive(Debug)]
pub struct Variant {
    /// Which values its factors have.
    pub levels: Levels,
    /// What came of each seed's training; none where it failed.
    pub runs: Vec<(u64, Option<EvalReport>)>,
}

impl Variant {
    /// The values of its factors.
    pub fn names(&self) -> [&'static str; 3] {
        names(self.levels)
    }

    /// `(seed, exact match)` of a split, of every training that has ended.
    pub fn scores(&self, split: &str) -> Vec<(u64, f64)> {
        let score =
            |(seed, report): &(u64, Option<EvalReport>)| Some((*seed, report.as_ref()?.all(split)?.exact_match));
        self.runs.iter().filter_map(score).collect()
    }
}

/// Every split that some training was asked about.
pub fn splits(variants: &[Variant]) -> Vec<String> {
    let reports = variants.iter().flat_map(|variant| &variant.runs).filter_map(|(_, report)| report.as_ref());
    reports.flat_map(|report| report.0.keys().cloned()).collect::<BTreeSet<_>>().into_iter().collect()
}
