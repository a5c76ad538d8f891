//! The learning rate as a function of the step, as HF transformers' schedules give it.

use serde::{Deserialize, Serialize};

/// The curves by their names in HF's `lr_scheduler_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Curve {
    /// The same from the first step to the last; warm-up is left out.
    Constant,
    /// Up to the full rate over the warm-up, then the same.
    ConstantWithWarmup,
    /// Up, then straight down to zero at the last step.
    #[default]
    Linear,
    /// Up, then half a cosine down to zero.
    Cosine,
    /// Up, then half a cosine down to [`Schedule::min_lr_rate`].
    CosineWithMinLr,
}

/// A factor on every learning rate, for each step of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// The curve after the warm-up.
    pub curve: Curve,
    /// Steps over which the factor rises from 0 to 1.
    pub warmup_steps: u64,
    /// Steps of the whole run.
    pub max_steps: u64,
    /// Where [`Curve::CosineWithMinLr`] ends, as a share of the full rate.
    pub min_lr_rate: f64,
}

impl Schedule {
    /// The factor for the step that follows `steps_done` steps: 0 at the start of a warm-up, 1 at its end.
    pub fn factor(&self, steps_done: u64) -> f64 {
        let (step, warmup) = (steps_done as f64, self.warmup_steps as f64);
        if self.curve != Curve::Constant && steps_done < self.warmup_steps {
            return step / warmup;
        }
        let progress = (step - warmup) / (self.max_steps as f64 - warmup).max(1.0);
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
        match self.curve {
            Curve::Constant | Curve::ConstantWithWarmup => 1.0,
            Curve::Linear => (1.0 - progress).max(0.0),
            Curve::Cosine => cosine.max(0.0),
            Curve::CosineWithMinLr => (cosine * (1.0 - self.min_lr_rate) + self.min_lr_rate).max(0.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_transformers() {
        let golden = fixtures::open("losses");
        let curves = [
            ("constant", Curve::Constant),
            ("constant_with_warmup", Curve::ConstantWithWarmup),
            ("linear", Curve::Linear),
            ("cosine", Curve::Cosine),
            ("cosine_with_min_lr", Curve::CosineWithMinLr),
        ];
        for (name, curve) in curves {
            let expected = Vec::<f64>::try_from(&golden[&*format!("schedule.{name}")]).unwrap();
            let schedule = Schedule { curve, warmup_steps: 5, max_steps: 40, min_lr_rate: 0.1 };
            for (step, expected) in expected.iter().enumerate() {
                let found = schedule.factor(step as u64);
                assert!((found - expected).abs() < 1e-9, "{name} at {step}: {found}, expected {expected}");
            }
        }
    }

    #[test]
    fn a_warm_up_that_fills_the_run_divides_by_nothing() {
        let schedule = Schedule { curve: Curve::Linear, warmup_steps: 4, max_steps: 4, min_lr_rate: 0.0 };
        assert_eq!([0, 2, 4].map(|step| schedule.factor(step)), [0.0, 0.5, 1.0]);
    }
}
