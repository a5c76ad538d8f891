//! The blind control: every question about another question's picture. What is still answered right was guessed.

use std::collections::{BTreeMap, HashSet};

use vora_data::Batch;
use vora_image::Pixels;

/// For each list of pictures another one of the same length, none the same; none where there are no others.
///
/// Different lists change places in the order in which they come, halfway round, so each is seen as another's once.
pub(crate) fn other_pictures<'a>(lists: impl Iterator<Item = &'a [String]> + Clone) -> Vec<Option<Vec<String>>> {
    let mut seen = HashSet::new();
    let mut by_len: BTreeMap<usize, Vec<&[String]>> = BTreeMap::new();
    for list in lists.clone() {
        if !list.is_empty() && seen.insert(list) {
            by_len.entry(list.len()).or_default().push(list);
        }
    }
    let mut other = BTreeMap::new();
    for lists in by_len.values() {
        let half = lists.len() / 2;
        for (place, list) in lists.iter().enumerate().filter(|_| half > 0) {
            other.insert(*list, lists[(place + half) % lists.len()].to_vec());
        }
    }
    lists.map(|list| other.get(list).cloned()).collect()
}

/// Gives every picture's place to a picture of the same size that is another sample's and shows something else. For
/// each question, whether all its pictures were exchanged.
pub fn show_other_pictures(batch: &mut Batch) -> Vec<bool> {
    let owners: Vec<usize> = batch
        .samples
        .iter()
        .enumerate()
        .flat_map(|(row, sample)| std::iter::repeat_n(row, sample.num_images))
        .collect();
    let n = batch.images.len();
    let other = |i: usize| {
        let picture = &batch.images[i];
        let fits = |j: &usize| {
            let other = &batch.images[*j];
            owners[*j] != owners[i]
                && (other.height, other.width) == (picture.height, picture.width)
                && other.data != picture.data
        };
        (i + 1..i + n).map(|j| j % n).find(fits)
    };
    let others: Vec<Option<usize>> = (0..n).map(other).collect();
    let images: Vec<Pixels> = others.iter().enumerate().map(|(i, j)| batch.images[j.unwrap_or(i)].clone()).collect();
    batch.images = images;
    let is_blind = |row: usize| {
        let mut own = others.iter().zip(&owners).filter(|(_, owner)| **owner == row).peekable();
        own.peek().is_some() && own.all(|(other, _)| other.is_some())
    };
    let samples = batch.samples.iter().enumerate();
    samples.flat_map(|(row, sample)| std::iter::repeat_n(is_blind(row), sample.questions.len())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(id: &str, pictures: &[f32], questions: usize) -> vora_data::Sample {
        let question = vora_data::QuestionSpan {
            kind: "turn".into(),
            question: String::new(),
            answer: String::new(),
            tokens: 0..1,
            is_rejected: false,
        };
        vora_data::Sample {
            id: id.into(),
            input_ids: vec![1],
            targets: vec![2],
            spans: vec![vora_text::Span::text(1)],
            images: pictures.iter().map(|&p| Pixels { data: vec![p; 3], height: 1, width: 1 }).collect(),
            questions: vec![question; questions],
            cut_answers: 0,
            notes: Vec::new(),
        }
    }

    #[test]
    fn the_blind_control_sees_another_picture() {
        let samples = vec![
            sample("a", &[1.0], 2),
            sample("b", &[1.0], 1), // looks like a
            sample("c", &[2.0, 3.0], 1),
            sample("d", &[], 1),
        ];
        let mut batch = vora_data::collate(samples, 0);
        assert_eq!(show_other_pictures(&mut batch), [true, true, true, true, false]);
        let shown: Vec<f32> = batch.images.iter().map(|p| p.data[0]).collect();
        assert_eq!(shown, [2.0, 2.0, 1.0, 1.0]);
        let mut alone = vora_data::collate(vec![sample("a", &[1.0], 1)], 0);
        assert_eq!(show_other_pictures(&mut alone), [false]);
    }
}
