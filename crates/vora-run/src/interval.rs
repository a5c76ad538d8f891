//! 95% intervals: of a share, Wilson's; of a mean, Student's.

use std::fmt;

/// The quantile of the normal distribution below which 97.5% lie.
const Z: f64 = 1.959_963_984_540_054;

/// The same quantile of Student's t with 1 to 30 degrees of freedom.
const T: [f64; 30] = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
];

/// The ends of a 95% interval.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Interval {
    /// Its lower end.
    pub low: f64,
    /// Its upper end.
    pub high: f64,
}

impl Interval {
    /// Wilson's score interval of a share that was found in `n` trials (Wilson 1927), which stays within 0 and 1; all of
    /// that where there were none.
    pub fn of_share(share: f64, n: u64) -> Self {
        if n == 0 {
            return Self { low: 0.0, high: 1.0 };
        }
        let (n, z2) = (n as f64, Z * Z);
        let middle = (share + z2 / (2.0 * n)) / (1.0 + z2 / n);
        let half = Z / (1.0 + z2 / n) * (share * (1.0 - share) / n + z2 / (4.0 * n * n)).sqrt();
        Self { low: (middle - half).max(0.0), high: (middle + half).min(1.0) }
    }

    /// Student's interval of the mean that `values` were drawn around; none of fewer than two. Of differences between
    /// pairs it is that of the paired t-test.
    pub fn of_mean(values: &[f64]) -> Option<Self> {
        let n = values.len() as f64;
        let t = t_quantile(values.len().checked_sub(1)?)?;
        let mean = values.iter().sum::<f64>() / n;
        let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (n - 1.0);
        let half = t * (variance / n).sqrt();
        Some(Self { low: mean - half, high: mean + half })
    }
}

impl fmt::Display for Interval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let places = f.precision().unwrap_or(3);
        write!(f, "{:.places$} to {:.places$}", self.low, self.high)
    }
}

/// Beyond the table the expansion in powers of 1 / `df` (Abramowitz and Stegun 26.7.5), which is off by less than 0.001.
fn t_quantile(df: usize) -> Option<f64> {
    let series =
        |df: f64| Z + (Z.powi(3) + Z) / (4.0 * df) + (5.0 * Z.powi(5) + 16.0 * Z.powi(3) + 3.0 * Z) / (96.0 * df * df);
    Some(T.get(df.checked_sub(1)?).copied().unwrap_or_else(|| series(df as f64)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn assert_ends(interval: Interval, low: f64, high: f64, by: f64) {
        assert!((interval.low - low).abs() < by && (interval.high - high).abs() < by, "{interval:?}: {low} to {high}");
    }

    #[test]
    fn shares_have_the_published_intervals() {
        // Newcombe 1998, Statistics in Medicine 17, table I, method 3.
        for (right, n, low, high) in
            [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]
        {
            assert_ends(Interval::of_share(f64::from(right) / n as f64, n), low, high, 5e-5);
        }
        assert_ends(Interval::of_share(1.0, 20), 1.0 - 0.1611, 1.0, 5e-5);
        assert_eq!(Interval::of_share(0.0, 0), Interval { low: 0.0, high: 1.0 });
    }

    #[test]
    fn differences_have_the_interval_of_the_paired_t_test() {
        // Student 1908, The probable error of a mean: R's `t.test(extra ~ group, data = sleep, paired = TRUE)`.
        let first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0];
        let second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4];
        let differences: Vec<f64> = first.iter().zip(second).map(|(a, b)| a - b).collect();
        assert_ends(Interval::of_mean(&differences).unwrap(), -2.459_885_8, -0.700_114_2, 1e-4);
        assert_eq!((Interval::of_mean(&[]), Interval::of_mean(&[1.0])), (None, None));
        assert_eq!(Interval::of_mean(&[0.5; 3]), Some(Interval { low: 0.5, high: 0.5 }));
    }

    #[test]
    fn quantiles_go_on_beyond_their_table() {
        for (df, t) in
            [(1, 12.706), (4, 2.776), (30, 2.042), (40, 2.021), (60, 2.000), (120, 1.980), (1_000_000, 1.960)]
        {
            assert!((t_quantile(df).unwrap() - t).abs() < 1e-3, "{df}: {:?}", t_quantile(df));
        }
        assert_eq!(t_quantile(0), None);
    }
}
