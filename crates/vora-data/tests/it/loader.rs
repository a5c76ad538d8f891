//! A walk of one process.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use vora_data::{Loader, LoaderConfig, Sample, Source};

use crate::Numbers;

fn load(len: Option<u64>, bad: &[u64], config: LoaderConfig) -> Loader {
    Loader::new(Arc::new(Numbers { len, bad: bad.to_vec() }), config).unwrap()
}

fn numbers(loader: &mut Loader, batches: usize) -> Vec<i64> {
    loader.take(batches).flat_map(|batch| batch.unwrap().input_ids).collect()
}

#[test]
fn order_is_the_same_for_any_number_of_workers() {
    let config = LoaderConfig { batch_size: 3, shuffle: true, seed: 5, ..LoaderConfig::default() };
    let order = |num_workers| numbers(&mut load(Some(10), &[4], LoaderConfig { num_workers, ..config.clone() }), 12);
    let alone = order(1);
    assert_eq!(alone.len(), 36);
    for num_workers in [2, 3, 7] {
        assert_eq!(order(num_workers), alone);
    }
    let mut epoch = alone[..9].to_vec();
    epoch.sort_unstable();
    assert_eq!(epoch, [0, 1, 2, 3, 5, 6, 7, 8, 9]); // each once before any twice, the bad one left out
    assert_ne!(alone[..9], alone[9..18]);
}

#[test]
fn a_walk_resumes_where_it_stopped() {
    let config = LoaderConfig { batch_size: 4, num_workers: 3, shuffle: true, ..LoaderConfig::default() };
    for len in [Some(11), None] {
        let mut whole = load(len, &[2, 3, 9], config.clone());
        let mut first = load(len, &[2, 3, 9], config.clone());
        assert_eq!(numbers(&mut first, 5), numbers(&mut whole, 5));
        let mut second = load(len, &[2, 3, 9], LoaderConfig { start: first.position(), ..config.clone() });
        assert_eq!(numbers(&mut second, 5), numbers(&mut whole, 5));
        assert_eq!(second.position(), whole.position());
        assert_eq!(first.num_skipped() + second.num_skipped(), whole.num_skipped());
    }
}

#[test]
fn an_end_makes_the_last_batch_small() {
    let config = LoaderConfig { batch_size: 4, num_workers: 2, end: Some(6), ..LoaderConfig::default() };
    let batches: Vec<_> = load(None, &[1], config).map(|batch| batch.unwrap().input_ids).collect();
    assert_eq!(batches, [vec![0, 2, 3, 4], vec![5]]);
}

#[test]
fn bad_samples_are_skipped_until_there_are_too_many() {
    let bad: Vec<u64> = (3..102).collect();
    let mut loader = load(None, &bad, LoaderConfig { batch_size: 2, ..LoaderConfig::default() });
    assert_eq!(numbers(&mut loader, 2), [0, 1, 2, 102]);
    assert_eq!(loader.num_skipped(), 99);

    let bad: Vec<u64> = (3..103).collect();
    let mut loader = load(None, &bad, LoaderConfig { batch_size: 2, ..LoaderConfig::default() });
    assert_eq!(numbers(&mut loader, 1), [0, 1]);
    let message = format!("{:#}", loader.next().unwrap().unwrap_err());
    assert_eq!(message, "100 bad records in a row, the last is: number 102 is bad");
}

#[test]
fn a_source_of_nothing_but_bad_samples_stops() {
    let mut loader = load(Some(3), &[0, 1, 2], LoaderConfig { num_workers: 2, ..LoaderConfig::default() });
    assert!(loader.next().unwrap().is_err());
}

#[test]
fn ranks_share_every_pass() {
    for (world_size, num_workers) in [(2, 1), (3, 2), (4, 3)] {
        let rank = |rank| {
            let config = LoaderConfig { batch_size: 3, num_workers, shuffle: true, seed: 9, ..LoaderConfig::default() };
            let config = LoaderConfig { rank, world_size, end: Some(24), ..config };
            let mut loader = load(Some(12), &[], config);
            let found = numbers(&mut loader, 100);
            assert!(loader.position() >= 24);
            found
        };
        let mut two_passes: Vec<_> = (0..world_size).flat_map(rank).collect();
        two_passes.sort_unstable();
        assert!(two_passes.into_iter().eq((0..24).map(|n| n / 2)), "{world_size} ranks");
    }
    let config = LoaderConfig { rank: 2, world_size: 2, ..LoaderConfig::default() };
    let refused = Loader::new(Arc::new(Numbers { len: None, bad: Vec::new() }), config).err().unwrap();
    assert_eq!(refused.to_string(), "rank 2 of 2 processes");
}

/// Every third sample has a picture.
struct Mixed;

impl Source for Mixed {
    fn len(&self) -> Option<u64> {
        Some(50)
    }
    fn sample(&self, index: u64) -> Result<Sample> {
        let mut sample = Numbers { len: None, bad: vec![7, 8] }.sample(index)?;
        if index.is_multiple_of(3) {
            sample.images.push(vora_image::Pixels { data: vec![0.0; 3], height: 1, width: 1 });
        }
        Ok(sample)
    }
}

#[test]
fn grouped_batches_are_of_one_modality_and_resume_with_what_they_held() {
    let config = LoaderConfig { batch_size: 4, shuffle: true, group_by_modality: true, ..LoaderConfig::default() };
    let config = LoaderConfig { num_workers: 3, end: Some(50), ..config };
    let batches = |loader: &mut Loader, n| loader.take(n).collect::<Result<Vec<_>>>().unwrap();
    let whole = batches(&mut Loader::new(Arc::new(Mixed), config.clone()).unwrap(), 100);
    let mut ids: Vec<i64> = whole.iter().flat_map(|batch| batch.input_ids.clone()).collect();
    ids.sort_unstable();
    assert!(ids.into_iter().eq((0..50).filter(|n| ![7, 8].contains(n))));
    for batch in &whole {
        let with_picture = batch.input_ids.iter().filter(|id| **id % 3 == 0).count();
        assert!(with_picture == 0 || with_picture == batch.input_ids.len(), "{:?}", batch.input_ids);
    }
    let mut held = 0;
    for stop in 1..whole.len() {
        let mut first = Loader::new(Arc::new(Mixed), config.clone()).unwrap();
        assert_eq!(batches(&mut first, stop), whole[..stop]);
        held += first.held().len();
        let resumed = LoaderConfig { start: first.position(), held: first.held(), ..config.clone() };
        let mut second = Loader::new(Arc::new(Mixed), resumed).unwrap();
        assert_eq!((second.position(), second.held()), (first.position(), first.held()));
        assert_eq!(batches(&mut second, 100), whole[stop..]);
    }
    assert!(held > 0);
}

#[test]
fn packed_batches_resume_with_each_record_once() {
    /// Samples of 1 to 7 tokens, each its number.
    struct Lengths;
    impl Source for Lengths {
        fn len(&self) -> Option<u64> {
            Some(40)
        }
        fn sample(&self, index: u64) -> Result<Sample> {
            let sample = Numbers { len: None, bad: vec![11] }.sample(index)?;
            let len = 1 + (index * 5 % 7) as usize;
            Ok(Sample {
                input_ids: vec![index as i64; len],
                targets: vec![0; len],
                spans: vec![vora_text::Span::text(len as i64)],
                ..sample
            })
        }
    }
    for group_by_modality in [false, true] {
        let config = LoaderConfig {
            batch_size: 2,
            row_len: Some(9),
            num_workers: 2,
            shuffle: true,
            group_by_modality,
            end: Some(40),
            ..LoaderConfig::default()
        };
        let batches = |loader: &mut Loader, n| loader.take(n).collect::<Result<Vec<_>>>().unwrap();
        let whole = batches(&mut Loader::new(Arc::new(Lengths), config.clone()).unwrap(), 100);
        assert!(whole.iter().all(|batch| batch.seq <= 9) && whole.iter().any(|batch| batch.samples.len() > 3));
        let mut ids: Vec<u64> = whole.iter().flat_map(|b| &b.samples).map(|s| s.id.parse().unwrap()).collect();
        ids.sort_unstable();
        assert!(ids.into_iter().eq((0..40).filter(|n| *n != 11)));
        for stop in 1..whole.len() {
            let mut first = Loader::new(Arc::new(Lengths), config.clone()).unwrap();
            assert_eq!(batches(&mut first, stop), whole[..stop]);
            let resumed = LoaderConfig { start: first.position(), held: first.held(), ..config.clone() };
            assert_eq!(batches(&mut Loader::new(Arc::new(Lengths), resumed).unwrap(), 100), whole[stop..]);
        }
    }
}

#[test]
fn notes_are_counted() {
    struct Noted;
    impl Source for Noted {
        fn len(&self) -> Option<u64> {
            None
        }
        fn sample(&self, index: u64) -> Result<Sample> {
            let sample = Numbers { len: None, bad: Vec::new() }.sample(index)?;
            Ok(Sample { notes: vec!["odd".to_owned(); usize::from(index % 2 == 1)], ..sample })
        }
    }
    let mut loader = Loader::new(Arc::new(Noted), LoaderConfig { batch_size: 6, ..Default::default() }).unwrap();
    numbers(&mut loader, 2);
    assert_eq!(loader.noted(), &BTreeMap::from([("odd".to_owned(), 6)]));
}

#[test]
fn a_panic_is_a_bad_sample() {
    struct Panics;
    impl Source for Panics {
        fn len(&self) -> Option<u64> {
            None
        }
        fn sample(&self, index: u64) -> Result<Sample> {
            assert!(index != 1, "a broken decoder");
            Numbers { len: None, bad: Vec::new() }.sample(index)
        }
    }
    let mut loader = Loader::new(Arc::new(Panics), LoaderConfig { batch_size: 2, ..Default::default() }).unwrap();
    assert_eq!(numbers(&mut loader, 1), [0, 2]);
    assert_eq!(loader.num_skipped(), 1);
}

#[test]
fn waiting_is_counted() {
    struct Slow;
    impl Source for Slow {
        fn len(&self) -> Option<u64> {
            None
        }
        fn sample(&self, index: u64) -> Result<Sample> {
            thread::sleep(Duration::from_millis(10));
            Numbers { len: None, bad: Vec::new() }.sample(index)
        }
    }
    let mut loader = Loader::new(Arc::new(Slow), LoaderConfig { batch_size: 2, ..Default::default() }).unwrap();
    loader.next().unwrap().unwrap();
    assert!(loader.waited() >= Duration::from_millis(9), "{:?}", loader.waited());
}

#[test]
fn a_config_of_nothing_is_refused() {
    let error = |len, config| {
        let source = Arc::new(Numbers { len, bad: Vec::new() });
        Loader::new(source, config).err().unwrap().to_string()
    };
    let default = LoaderConfig::default;
    assert!(error(None, LoaderConfig { num_workers: 0, ..default() }).contains("data workers is 0"));
    assert!(error(None, LoaderConfig { batch_size: 0, ..default() }).contains("batch size is 0"));
    assert!(error(None, LoaderConfig { row_len: Some(0), ..default() }).contains("packed rows is 0"));
    assert!(error(Some(0), default()).contains("no records"));
}
