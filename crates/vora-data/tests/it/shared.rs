//! A walk that several processes share; here they are threads.

use std::sync::{Arc, Barrier, Mutex};
use std::thread;

use anyhow::Result;
use vora_data::{Batch, Loader, LoaderConfig, Peers, Sample, Source};

use crate::Numbers;

/// Processes that are threads.
#[derive(Clone)]
struct Threads {
    rank: usize,
    said: Arc<Mutex<Vec<Vec<u8>>>>,
    barrier: Arc<Barrier>,
}

impl Peers for Threads {
    fn all_gather(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.said.lock().unwrap()[self.rank] = mine.to_vec();
        self.barrier.wait();
        let all = self.said.lock().unwrap().clone();
        self.barrier.wait();
        Ok(all)
    }
}

/// Samples of 1 to 7 tokens, of which every third has a picture.
struct Lengths(Numbers);

impl Source for Lengths {
    fn len(&self) -> Option<u64> {
        Some(40)
    }
    fn sample(&self, index: u64) -> Result<Sample> {
        let mut sample = self.0.sample(index)?;
        let len = 1 + (index * 5 % 7) as usize;
        (sample.input_ids, sample.targets) = (vec![index as i64; len], vec![0; len]);
        sample.spans = vec![vora_text::Span::text(len as i64)];
        if index.is_multiple_of(3) {
            sample.images.push(vora_image::Pixels { data: vec![0.0; 3], height: 1, width: 1 });
        }
        Ok(sample)
    }
}

fn source() -> Arc<dyn Source> {
    Arc::new(Lengths(Numbers { len: None, bad: vec![3, 4, 5, 6, 17, 30] }))
}

fn ids(batch: &Batch) -> Vec<String> {
    batch.samples.iter().map(|sample| sample.id.clone()).collect()
}

/// The ids of a rank's batches, and where its loader stands afterwards: position, what it holds, records left out.
type Walked = (Vec<Vec<String>>, u64, Vec<u64>, u64);

/// Each rank's walk.
fn run(config: &LoaderConfig, world_size: usize, batches: usize) -> Vec<Walked> {
    let said = Arc::new(Mutex::new(vec![Vec::new(); world_size]));
    let barrier = Arc::new(Barrier::new(world_size));
    let rank = |rank| {
        let config = LoaderConfig { rank: rank as u64, world_size: world_size as u64, ..config.clone() };
        let peers = Threads { rank, said: Arc::clone(&said), barrier: Arc::clone(&barrier) };
        move || {
            let mut loader = Loader::shared(source(), config, Box::new(peers)).unwrap();
            let found = loader.by_ref().take(batches).map(|batch| ids(&batch.unwrap())).collect();
            (found, loader.position(), loader.held(), loader.num_skipped())
        }
    };
    let threads: Vec<_> = (0..world_size).map(|number| thread::spawn(rank(number))).collect();
    threads.into_iter().map(|thread| thread.join().unwrap()).collect()
}

#[test]
fn together_they_make_the_batches_of_one_process() {
    let plain = LoaderConfig { shuffle: true, seed: 3, num_workers: 2, ..LoaderConfig::default() };
    let packed = LoaderConfig { row_len: Some(9), ..plain.clone() };
    let grouped = LoaderConfig { group_by_modality: true, ..plain.clone() };
    for (config, is_dealt) in [(plain, true), (packed, false), (grouped, false)] {
        for (world_size, batch_size) in [(2, 3), (3, 2), (6, 1), (1, 6)] {
            let whole = LoaderConfig { batch_size: 6, ..config.clone() };
            let mut one = Loader::new(source(), whole).unwrap();
            let expected: Vec<_> = one.by_ref().take(30).map(|batch| ids(&batch.unwrap())).collect();
            let ranks = run(&LoaderConfig { batch_size, ..config.clone() }, world_size, 30);
            for (number, expected) in expected.iter().enumerate() {
                let of_rank = ranks.iter().map(|(batches, ..)| batches[number].clone());
                assert!(!is_dealt || of_rank.clone().all(|ids| ids.len() == batch_size));
                let (mut found, mut expected) = (of_rank.flatten().collect::<Vec<_>>(), expected.clone());
                found.sort();
                expected.sort();
                assert_eq!(found, expected, "batch {number} of {world_size} ranks");
            }
            for (_, position, held, num_skipped) in ranks {
                assert_eq!((position, held, num_skipped), (one.position(), one.held(), one.num_skipped()));
            }
        }
    }
}

#[test]
fn a_shared_walk_goes_on_with_any_number_of_ranks() {
    let plain = LoaderConfig { shuffle: true, seed: 3, ..LoaderConfig::default() };
    for row_len in [None, Some(9)] {
        let config = |batch_size| LoaderConfig { batch_size, row_len, ..plain.clone() };
        let whole = run(&config(2), 3, 12);
        for stop in [1, 5, 8] {
            let (_, start, held, _) = run(&config(2), 3, stop).remove(0);
            let rest = run(&LoaderConfig { start, held: held.clone(), ..config(2) }, 3, 12 - stop);
            for (whole, rest) in whole.iter().zip(&rest) {
                assert_eq!(whole.0[stop..], rest.0); // the same for each rank
            }
            let mut other = run(&LoaderConfig { start, held, ..config(3) }, 2, 12 - stop);
            let two = other.remove(1).0.into_iter().zip(other.remove(0).0).map(|(a, b)| [a, b].concat());
            let three = (stop..12).map(|batch| whole.iter().flat_map(|rank| rank.0[batch].clone()).collect());
            for (mut two, mut three) in two.zip::<Vec<Vec<String>>>(three.collect()) {
                two.sort();
                three.sort();
                assert_eq!(two, three);
            }
        }
    }
    // What a packed walk held comes first where the rows are not packed any more.
    let held = LoaderConfig { batch_size: 2, start: 20, held: vec![7, 11, 13], ..LoaderConfig::default() };
    let ranks = run(&held, 2, 2);
    assert_eq!([&ranks[0].0, &ranks[1].0], [&[["7", "11"], ["22", "24"]], &[["13", "20"], ["21", "23"]]]);
}

#[test]
fn nothing_but_bad_records_ends_all() {
    let said = Arc::new(Mutex::new(vec![Vec::new(); 2]));
    let barrier = Arc::new(Barrier::new(2));
    let rank = |rank: usize| {
        let peers = Threads { rank, said: Arc::clone(&said), barrier: Arc::clone(&barrier) };
        let source = Arc::new(Numbers { len: None, bad: (5..200).collect() });
        let config = LoaderConfig { batch_size: 2, rank: rank as u64, world_size: 2, ..LoaderConfig::default() };
        move || {
            let mut loader = Loader::shared(source, config, Box::new(peers)).unwrap();
            loader.next().unwrap().unwrap();
            format!("{:#}", loader.next().unwrap().unwrap_err())
        }
    };
    let threads = [0, 1].map(|number| thread::spawn(rank(number)));
    for thread in threads {
        let error = thread.join().unwrap();
        assert!(error.starts_with("100 bad records in a row, the last is:"), "{error}");
    }
}
