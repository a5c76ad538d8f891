//! How likely a token was, and what else was likely in its place.

/// The natural logarithm of a token's probability by the logits of all tokens, and the `top` likeliest with theirs, the likeliest
/// first.
pub(super) fn logprob(logits: &[f32], token: i64, top: usize) -> (f32, Vec<(i64, f32)>) {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - highest).exp()).sum();
    let log_sum = f64::from(highest) + sum.ln();
    let of = |logit: f32| (f64::from(logit) - log_sum) as f32;
    let mut order: Vec<usize> = (0..logits.len()).collect();
    let by_logit = |a: &usize, b: &usize| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
    if top < order.len() {
        order.select_nth_unstable_by(top, by_logit);
        order.truncate(top);
    }
    order.sort_unstable_by(by_logit);
    let chosen = usize::try_from(token).ok().and_then(|token| logits.get(token));
    let likeliest = order.into_iter().map(|token| (token as i64, of(logits[token]))).collect();
    (chosen.map_or(f32::NEG_INFINITY, |&logit| of(logit)), likeliest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logarithms_of_the_softmax() {
        let logits = [0.0f32, 2f32.ln(), 5f32.ln() + 0.0, f32::NEG_INFINITY]; // 1/8, 2/8, 5/8, 0
        let (own, top) = logprob(&logits, 1, 2);
        assert!((own - 0.25f32.ln()).abs() < 1e-6);
        assert_eq!(top.iter().map(|(token, _)| *token).collect::<Vec<_>>(), [2, 1]);
        assert!((top[0].1 - 0.625f32.ln()).abs() < 1e-6);
        assert_eq!(logprob(&logits, 3, 0), (f32::NEG_INFINITY, Vec::new()));
        assert_eq!(logprob(&logits, 0, 9).1.len(), 4);
    }
}
