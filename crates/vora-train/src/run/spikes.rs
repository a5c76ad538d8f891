//! Losses that stand out.

use std::collections::VecDeque;

/// Finds losses that stand out: more than six standard deviations above the mean of the last 128.
#[derive(Debug, Default)]
pub(crate) struct SpikeDetector {
    recent: VecDeque<f64>,
}

impl SpikeDetector {
    const WINDOW: usize = 128;

    /// Takes in a step's loss; for a spike, how many standard deviations above the mean it lies.
    pub(crate) fn observe(&mut self, loss: f64) -> Option<f64> {
        let n = self.recent.len() as f64;
        let mean = self.recent.iter().sum::<f64>() / n;
        let deviation = (self.recent.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n).sqrt();
        let sigmas = (loss - mean) / deviation;
        let is_full = self.recent.len() == Self::WINDOW;
        if is_full {
            self.recent.pop_front();
        }
        self.recent.push_back(loss);
        (is_full && sigmas > 6.0).then_some(sigmas)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spike_stands_out_of_a_full_window() {
        let mut detector = SpikeDetector::default();
        for i in 0..128 {
            assert_eq!(detector.observe(1.0 + 0.01 * f64::from(i % 7)), None);
        }
        assert_eq!(detector.observe(1.05), None);
        assert!(detector.observe(2.0).is_some_and(|sigmas| sigmas > 6.0));
    }
}
