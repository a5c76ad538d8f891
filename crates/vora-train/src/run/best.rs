//! The best evaluation of a run, by one number of it, as HF's `metric_for_best_model` names it.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use vora_recipe::split_of;
use vora_run::eval::EvalReport;

/// The checkpoint whose evaluation was the best so far.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Its step.
    pub step: u64,
    /// The number that it was chosen by.
    pub metric: f64,
}

impl Best {
    /// The better of `before` and this; of two alike the earlier, and a number that is NaN is never better.
    pub fn better(before: Option<Self>, step: u64, metric: f64, greater_is_better: bool) -> Option<Self> {
        let is_better = before.is_none_or(|best| match greater_is_better {
            true => metric > best.metric,
            false => metric < best.metric,
        });
        if is_better && !metric.is_nan() { Some(Self { step, metric }) } else { before }
    }
}

/// The number that `metric` names in a report.
pub(crate) fn value(report: &EvalReport, metric: &str) -> Result<f64> {
    let score = split_of(metric).and_then(|split| report.all(split));
    Ok(score
        .with_context(|| format!("metric_for_best_model is {metric}, the evaluation has no such number"))?
        .exact_match)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_is_the_first_of_the_highest_or_lowest() {
        let best = |greater| {
            let metrics = [f64::NAN, 0.5, 0.7, 0.7, f64::NAN, 0.2];
            let steps = metrics.into_iter().zip(1..);
            steps.fold(None, |best, (metric, step)| Best::better(best, step, metric, greater))
        };
        assert_eq!(best(true), Some(Best { step: 3, metric: 0.7 }));
        assert_eq!(best(false), Some(Best { step: 6, metric: 0.2 }));
    }
}
