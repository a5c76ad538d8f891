//! Dynamic scaling of the loss, so that gradients in f16 do not vanish: `torch.amp.GradScaler`'s rule.

use serde::{Deserialize, Serialize};

const GROWTH_FACTOR: f32 = 2.0;
const BACKOFF_FACTOR: f32 = 0.5;
const GROWTH_INTERVAL: u32 = 2000;

/// What the loss is multiplied with, and the gradient divided by. Halved by a step whose gradient overflowed, doubled
/// after a number of steps in a row that did not.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LossScale {
    /// The factor.
    pub scale: f32,
    /// Steps since it last changed.
    pub growth_tracker: u32,
}

impl Default for LossScale {
    fn default() -> Self {
        Self { scale: 65536.0, growth_tracker: 0 }
    }
}

impl LossScale {
    /// Learns from a step whether its gradient overflowed.
    pub fn update(&mut self, overflowed: bool) {
        self.update_at(overflowed, GROWTH_INTERVAL);
    }

    fn update_at(&mut self, overflowed: bool, growth_interval: u32) {
        self.growth_tracker += 1;
        if overflowed {
            *self = Self { scale: self.scale * BACKOFF_FACTOR, growth_tracker: 0 };
        } else if self.growth_tracker == growth_interval {
            let grown = self.scale * GROWTH_FACTOR;
            *self = Self { scale: if grown.is_finite() { grown } else { self.scale }, growth_tracker: 0 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_torch() {
        let golden = fixtures::open("training");
        let overflows = Vec::<i64>::try_from(&golden["scaler.overflows"]).unwrap();
        let scales = Vec::<f64>::try_from(&golden["scaler.scales"]).unwrap();
        let trackers = Vec::<i64>::try_from(&golden["scaler.growth_trackers"]).unwrap();
        let mut scale = LossScale::default();
        for (step, overflowed) in overflows.into_iter().enumerate() {
            scale.update_at(overflowed == 1, 3);
            assert_eq!(f64::from(scale.scale), scales[step], "scale after step {step}");
            assert_eq!(i64::from(scale.growth_tracker), trackers[step], "tracker after step {step}");
        }
    }

    #[test]
    fn it_grows_after_two_thousand_steps_and_never_beyond_what_f32_has() {
        let mut scale = LossScale::default();
        (0..1999).for_each(|_| scale.update(false));
        assert_eq!(scale, LossScale { scale: 65536.0, growth_tracker: 1999 });
        scale.update(false);
        assert_eq!(scale, LossScale { scale: 131_072.0, growth_tracker: 0 });
        let mut largest = LossScale { scale: 2f32.powi(127), growth_tracker: 1999 };
        largest.update(false);
        assert_eq!(largest, LossScale { scale: 2f32.powi(127), growth_tracker: 0 });
    }
}
