//! The learning rate as a function of the step, as HF transformers' schedules give it.

use anyhow::{Result, ensure};
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
    /// Up, then half a cosine down to [`SchedulerKwargs::min_lr_rate`].
    CosineWithMinLr,
    /// Up, then with the root of the step's distance from the warm-up: `1 / sqrt(1 + (step - warmup) / timescale)`.
    InverseSqrt,
    /// Up, the same for most of the run, then down over [`SchedulerKwargs::num_decay_steps`].
    WarmupStableDecay,
}

/// The shape of a way up or down in [`Curve::WarmupStableDecay`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ramp {
    /// Straight.
    #[serde(rename = "linear")]
    Linear,
    /// Half a cosine.
    #[serde(rename = "cosine")]
    Cosine,
    /// Steep at its low end.
    #[serde(rename = "1-sqrt")]
    OneMinusSqrt,
}

impl Ramp {
    /// From 1 at the start of a way down to 0 at its end; `progress` is 0 to 1.
    pub fn down(self, progress: f64) -> f64 {
        match self {
            Self::Linear => 1.0 - progress,
            Self::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            Self::OneMinusSqrt => 1.0 - progress.sqrt(),
        }
    }
}

/// HF's `lr_scheduler_kwargs`, those that a curve here has.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SchedulerKwargs {
    /// Share of the rate at which `cosine_with_min_lr` ends.
    pub min_lr_rate: f64,
    /// `inverse_sqrt`: steps in which `1 / factor^2` grows by 1; absent: those of the warm-up, or 10000 without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timescale: Option<u64>,
    /// `warmup_stable_decay`: steps on the way down.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_decay_steps: Option<u64>,
    /// `warmup_stable_decay`: steps at the full rate; absent: what warm-up and decay leave of the run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_stable_steps: Option<u64>,
    /// `warmup_stable_decay`: the way up; absent: linear.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup_type: Option<Ramp>,
    /// `warmup_stable_decay`: the way down; absent: cosine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decay_type: Option<Ramp>,
    /// `warmup_stable_decay`: where the way up begins and the way down ends, as a share of the rate; absent: 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_lr_ratio: Option<f64>,
}

impl SchedulerKwargs {
    /// Checks what the types leave open, for a schedule of this curve.
    ///
    /// # Errors
    /// Names the key.
    pub(crate) fn validate(&self, curve: Curve) -> Result<()> {
        for (key, value) in [("min_lr_rate", self.min_lr_rate), ("min_lr_ratio", self.min_lr_ratio.unwrap_or(0.0))] {
            let is_share = (0.0..1.0).contains(&value);
            ensure!(is_share, "lr_scheduler_kwargs.{key} is {value}, it must be at least 0 and below 1");
        }
        ensure!(
            curve != Curve::WarmupStableDecay || self.num_decay_steps.is_some(),
            "lr_scheduler_type is warmup_stable_decay, but lr_scheduler_kwargs.num_decay_steps is missing"
        );
        ensure!(self.timescale != Some(0), "lr_scheduler_kwargs.timescale is 0, it must be at least 1");
        Ok(())
    }

    /// Those that are given and that `curve` does not read.
    pub fn without_effect(&self, curve: Curve) -> Vec<&'static str> {
        let all = [
            ("lr_scheduler_kwargs.min_lr_rate", self.min_lr_rate != 0.0, Curve::CosineWithMinLr),
            ("lr_scheduler_kwargs.timescale", self.timescale.is_some(), Curve::InverseSqrt),
            ("lr_scheduler_kwargs.num_decay_steps", self.num_decay_steps.is_some(), Curve::WarmupStableDecay),
            ("lr_scheduler_kwargs.num_stable_steps", self.num_stable_steps.is_some(), Curve::WarmupStableDecay),
            ("lr_scheduler_kwargs.warmup_type", self.warmup_type.is_some(), Curve::WarmupStableDecay),
            ("lr_scheduler_kwargs.decay_type", self.decay_type.is_some(), Curve::WarmupStableDecay),
            ("lr_scheduler_kwargs.min_lr_ratio", self.min_lr_ratio.is_some(), Curve::WarmupStableDecay),
        ];
        all.into_iter().filter(|(_, given, of)| *given && *of != curve).map(|(key, ..)| key).collect()
    }
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
    /// What some curves need beside these.
    pub kwargs: SchedulerKwargs,
}

impl Schedule {
    /// The factor for the step that follows `steps_done` steps: 0 at the start of a warm-up, 1 at its end.
    pub fn factor(&self, steps_done: u64) -> f64 {
        let (step, warmup) = (steps_done as f64, self.warmup_steps as f64);
        if self.curve == Curve::WarmupStableDecay {
            return self.warmup_stable_decay(step, warmup);
        }
        if self.curve != Curve::Constant && steps_done < self.warmup_steps {
            return step / warmup;
        }
        let progress = (step - warmup) / (self.max_steps as f64 - warmup).max(1.0);
        let cosine = Ramp::Cosine.down(progress);
        match self.curve {
            Curve::Constant | Curve::ConstantWithWarmup | Curve::WarmupStableDecay => 1.0,
            Curve::Linear => (1.0 - progress).max(0.0),
            Curve::Cosine => cosine.max(0.0),
            Curve::CosineWithMinLr => (cosine * (1.0 - self.kwargs.min_lr_rate) + self.kwargs.min_lr_rate).max(0.0),
            Curve::InverseSqrt => {
                let timescale = self.kwargs.timescale.unwrap_or(if warmup > 0.0 { self.warmup_steps } else { 10_000 });
                (1.0 + (step - warmup) / timescale as f64).sqrt().recip()
            }
        }
    }

    /// As HF's `get_wsd_schedule`.
    fn warmup_stable_decay(&self, step: f64, warmup: f64) -> f64 {
        let kwargs = &self.kwargs;
        let min = kwargs.min_lr_ratio.unwrap_or(0.0);
        let above_min = |share: f64| (share * (1.0 - min) + min).max(0.0);
        let decay = kwargs.num_decay_steps.unwrap_or(0) as f64;
        let stable = kwargs.num_stable_steps.map_or(self.max_steps as f64 - warmup - decay, |steps| steps as f64);
        if step < warmup {
            let way = kwargs.warmup_type.unwrap_or(Ramp::Linear);
            return above_min(way.down(1.0 - step / warmup));
        }
        let decaying = step - warmup - stable;
        if decaying < 0.0 {
            1.0
        } else if decaying < decay {
            above_min(kwargs.decay_type.unwrap_or(Ramp::Cosine).down(decaying / decay))
        } else {
            min
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
            let kwargs = SchedulerKwargs { min_lr_rate: 0.1, ..SchedulerKwargs::default() };
            let schedule = Schedule { curve, warmup_steps: 5, max_steps: 40, kwargs };
            for (step, expected) in expected.iter().enumerate() {
                let found = schedule.factor(step as u64);
                assert!((found - expected).abs() < 1e-9, "{name} at {step}: {found}, expected {expected}");
            }
        }
    }

    #[test]
    fn a_warm_up_that_fills_the_run_divides_by_nothing() {
        let kwargs = SchedulerKwargs::default();
        let schedule = Schedule { curve: Curve::Linear, warmup_steps: 4, max_steps: 4, kwargs };
        assert_eq!([0, 2, 4].map(|step| schedule.factor(step)), [0.0, 0.5, 1.0]);
    }

    #[test]
    fn curves_with_settings_match_transformers() {
        let golden = fixtures::open("training");
        let wsd = SchedulerKwargs { num_decay_steps: Some(10), ..SchedulerKwargs::default() };
        let shaped = SchedulerKwargs {
            num_stable_steps: Some(12),
            warmup_type: Some(Ramp::Cosine),
            decay_type: Some(Ramp::OneMinusSqrt),
            min_lr_ratio: Some(0.1),
            ..wsd
        };
        let straight = SchedulerKwargs {
            warmup_type: Some(Ramp::OneMinusSqrt),
            decay_type: Some(Ramp::Linear),
            min_lr_ratio: Some(0.05),
            ..wsd
        };
        let (stable, root) = (Curve::WarmupStableDecay, Curve::InverseSqrt);
        let cases = [
            ("wsd", stable, wsd),
            ("wsd_shaped", stable, shaped),
            ("wsd_straight", stable, straight),
            ("inverse_sqrt", root, SchedulerKwargs::default()),
            ("inverse_sqrt_timescale", root, SchedulerKwargs { timescale: Some(20), ..SchedulerKwargs::default() }),
        ];
        for (name, curve, kwargs) in cases {
            let schedule = Schedule { curve, warmup_steps: 5, max_steps: 40, kwargs };
            let expected = Vec::<f64>::try_from(&golden[&*format!("schedule.{name}")]).unwrap();
            for (step, expected) in expected.iter().enumerate() {
                let found = schedule.factor(step as u64);
                assert!((found - expected).abs() < 1e-9, "{name} at {step}: {found}, expected {expected}");
            }
        }
        assert!(wsd.without_effect(stable).is_empty());
        assert_eq!(wsd.without_effect(Curve::Cosine), ["lr_scheduler_kwargs.num_decay_steps"]);
    }
}
