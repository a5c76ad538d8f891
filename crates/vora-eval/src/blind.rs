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

/// Gives every picture's place to a picture that is another sample's and shows something else: one of the same size, or
/// where there is none another one, stretched to it. For each question, whether all its pictures were exchanged.
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
        let is_other = |j: &usize| owners[*j] != owners[i] && batch.images[*j].data != picture.data;
        let is_alike = |j: &usize| {
            let other = &batch.images[*j];
            (other.height, other.width) == (picture.height, picture.width)
        };
        let mut others = (i + 1..i + n).map(|j| j % n).filter(is_other);
        let first = others.next()?;
        let alike = std::iter::once(first).chain(others).find(is_alike);
        Some(alike.map_or_else(
            || batch.images[first].stretched(picture.height, picture.width),
            |alike| batch.images[alike].clone(),
        ))
    };
    let others: Vec<Option<Pixels>> = (0..n).map(other).collect();
    let is_blind = |row: usize| {
        let mut own = others.iter().zip(&owners).filter(|(_, owner)| **owner == row).peekable();
        own.peek().is_some() && own.all(|(other, _)| other.is_some())
    };
    let samples = batch.samples.iter().enumerate();
    let blind = samples.flat_map(|(row, sample)| std::iter::repeat_n(is_blind(row), sample.questions.len())).collect();
    for (image, other) in batch.images.iter_mut().zip(others) {
        if let Some(other) = other {
            *image = other;
        }
    }
    blind
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
        // Of another size is better than none.
        let mut wide = sample("wide", &[4.0], 1);
        wide.images[0] = Pixels { data: vec![4.0; 6], height: 1, width: 2 };
        let mut batch = vora_data::collate(vec![wide, sample("a", &[1.0], 1)], 0);
        assert_eq!(show_other_pictures(&mut batch), [true, true]);
        assert_eq!(batch.images[0], Pixels { data: vec![1.0; 6], height: 1, width: 2 });
        assert_eq!(batch.images[1], Pixels { data: vec![4.0; 3], height: 1, width: 1 });
        let mut alone = vora_data::collate(vec![sample("a", &[1.0], 1)], 0);
        assert_eq!(show_other_pictures(&mut alone), [false]);
    }
}
