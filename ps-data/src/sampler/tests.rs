use proptest::prelude::*;

use super::*;

fn sampler(config: SamplerConfig) -> Sampler {
    Sampler::new(config).expect("a valid configuration")
}

/// All batches of one epoch.
fn epoch(sampler: &mut Sampler) -> Vec<Vec<usize>> {
    (0..sampler.batches_per_epoch())
        .map(|_| sampler.next_batch())
        .collect()
}

/// Valid configurations of shard 0, most with an incomplete end.
fn configs() -> impl Strategy<Value = SamplerConfig> {
    (
        1usize..400,
        1usize..40,
        1usize..9,
        any::<u64>(),
        any::<[bool; 2]>(),
    )
        .prop_map(
            |(num_examples, batch_size, num_shards, seed, [shuffle, drop_last])| SamplerConfig {
                num_shards,
                seed,
                shuffle,
                drop_last,
                ..SamplerConfig::new(num_examples, batch_size)
            },
        )
        .prop_filter("gives batches", |config| {
            Sampler::new(config.clone()).is_ok()
        })
}

fn shards(config: &SamplerConfig) -> Vec<Sampler> {
    (0..config.num_shards)
        .map(|shard| {
            sampler(SamplerConfig {
                shard,
                ..config.clone()
            })
        })
        .collect()
}

proptest! {
    /// DATA-1, over two epochs.
    #[test]
    fn all_shards_together_cover_each_example_once_per_epoch(config in configs()) {
        let mut shards = shards(&config);
        for _ in 0..2 {
            let mut seen = vec![0; config.num_examples];
            for shard in &mut shards {
                for batch in epoch(shard) {
                    prop_assert!(!batch.is_empty() && batch.len() <= config.batch_size);
                    batch.iter().for_each(|&index| seen[index] += 1);
                }
            }
            let covered = seen.iter().filter(|&&times| times == 1).count();
            let block = config.batch_size * config.num_shards;
            let left_out = if config.drop_last { config.num_examples % block } else { 0 };
            prop_assert_eq!(covered, config.num_examples - left_out);
            prop_assert!(seen.iter().all(|&times| times <= 1));
        }
    }

    #[test]
    fn with_drop_last_all_shards_have_equally_many_full_batches(config in configs()) {
        let config = SamplerConfig { drop_last: true, ..config };
        prop_assume!(Sampler::new(config.clone()).is_ok());
        for mut shard in shards(&config) {
            let batches = epoch(&mut shard);
            let expected = config.num_examples / (config.batch_size * config.num_shards);
            prop_assert_eq!(batches.len(), expected);
            prop_assert!(batches.iter().all(|batch| batch.len() == config.batch_size));
        }
    }

    #[test]
    fn without_drop_last_shards_differ_by_at_most_one_example(config in configs()) {
        let config = SamplerConfig { drop_last: false, ..config };
        let sizes: Vec<usize> = shards(&config)
            .iter_mut()
            .map(|shard| epoch(shard).concat().len())
            .collect();
        let (least, most) = (sizes.iter().min(), sizes.iter().max());
        prop_assert!(most.expect("a shard") - least.expect("a shard") <= 1, "{sizes:?}");
    }

    /// DATA-2: what makes N synchronous workers equal one worker on the joined batch.
    #[test]
    fn shards_in_step_see_the_batches_of_one_larger_worker(config in configs()) {
        let mut joined = sampler(SamplerConfig {
            batch_size: config.batch_size * config.num_shards,
            num_shards: 1,
            ..config.clone()
        });
        let mut shards = shards(&config);
        for expected in epoch(&mut joined) {
            let mut batch = Vec::new();
            for shard in &mut shards {
                if shard.cursor().epoch == 0 {
                    batch.extend(shard.next_batch());
                }
            }
            prop_assert_eq!(batch, expected);
        }
    }

    /// DATA-3, also across epochs, backwards, and through serde.
    #[test]
    fn a_resumed_cursor_continues_identically(config in configs(), before in 0usize..60) {
        let mut original = sampler(config.clone());
        for _ in 0..before {
            original.next_batch();
        }
        let saved = serde_json::to_string(&original.cursor()).expect("serializable");
        let rest: Vec<_> = (0..30).map(|_| original.next_batch()).collect();

        let mut fresh = sampler(config);
        fresh.seek(serde_json::from_str(&saved).expect("a cursor")).expect("in range");
        original.seek(fresh.cursor()).expect("in range");
        for mut resumed in [fresh, original] {
            let again: Vec<_> = (0..30).map(|_| resumed.next_batch()).collect();
            prop_assert_eq!(&again, &rest);
        }
    }
}

/// Expected values from this program, which shares no code with the crate:
///
/// ```python
/// import struct
/// def block(key, counter):
///     s = [0x61707865, 0x3320646e, 0x79622d32, 0x6b206574, *struct.unpack('<8I', key), counter, 0, 0, 0]
///     w = s[:]
///     def qr(a, b, c, d):
///         for x, y, z, r in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
///             w[x] = (w[x] + w[y]) & 0xffffffff
///             v = w[z] ^ w[x]
///             w[z] = (v << r | v >> (32 - r)) & 0xffffffff
///     for _ in range(4):
///         qr(0,4,8,12); qr(1,5,9,13); qr(2,6,10,14); qr(3,7,11,15)
///         qr(0,5,10,15); qr(1,6,11,12); qr(2,7,8,13); qr(3,4,9,14)
///     return [(a + b) & 0xffffffff for a, b in zip(w, s)]
/// def permutation(n, seed, epoch):
///     key = struct.pack('<QQ', seed, epoch) + b'ps-data shuffle\0'
///     words = (x for counter in range(1 << 32) for x in block(key, counter))
///     order = list(range(n))
///     for last in range(n - 1, 0, -1):
///         bound = last + 1
///         while True:
///             product = (next(words) | next(words) << 32) * bound
///             if product % 2**64 >= 2**64 % bound:
///                 break
///         chosen = product >> 64
///         order[last], order[chosen] = order[chosen], order[last]
///     return order
/// print(permutation(20, 7, 0))
/// print(permutation(20, 7, 1))
/// print(permutation(60000, 2**63 + 5, 3)[:8])
/// ```
#[test]
fn the_order_is_the_documented_one_on_every_platform() {
    let mut small = sampler(SamplerConfig {
        seed: 7,
        ..SamplerConfig::new(20, 20)
    });
    let expected = [
        18, 14, 9, 6, 16, 2, 0, 5, 10, 12, 11, 15, 17, 8, 3, 1, 7, 4, 19, 13,
    ];
    assert_eq!(small.next_batch(), expected);
    let expected = [
        7, 8, 9, 13, 12, 14, 15, 5, 0, 6, 4, 2, 17, 1, 16, 19, 3, 11, 10, 18,
    ];
    assert_eq!(small.next_batch(), expected);

    let mut large = sampler(SamplerConfig {
        seed: (1 << 63) + 5,
        ..SamplerConfig::new(60_000, 8)
    });
    large.seek(Cursor { epoch: 3, batch: 0 }).expect("in range");
    let expected = [50498, 59770, 16352, 46660, 50901, 21808, 14387, 45684];
    assert_eq!(large.next_batch(), expected);
}

#[test]
fn without_shuffle_examples_come_by_index() {
    let mut shards = shards(&SamplerConfig {
        shuffle: false,
        num_shards: 2,
        ..SamplerConfig::new(11, 3)
    });
    assert_eq!(epoch(&mut shards[0]), [vec![0, 1, 2], vec![6, 7, 8]]);
    assert_eq!(epoch(&mut shards[1]), [vec![3, 4, 5], vec![9, 10]]);
    assert_eq!(shards[0].cursor(), Cursor { epoch: 1, batch: 0 });
}

#[test]
fn epochs_and_seeds_give_different_orders() {
    let config = SamplerConfig::new(100, 100);
    let mut one = sampler(config.clone());
    let mut other = sampler(SamplerConfig { seed: 1, ..config });
    let orders = [one.next_batch(), one.next_batch(), other.next_batch()];
    assert!(orders[0] != orders[1] && orders[0] != orders[2] && orders[1] != orders[2]);
}

#[test]
fn impossible_configurations_are_refused() {
    let base = SamplerConfig::new(10, 4);
    let check = |config: SamplerConfig, expected: SamplerError| {
        assert_eq!(Sampler::new(config).expect_err("impossible"), expected);
    };
    check(SamplerConfig::new(0, 4), SamplerError::NoExamples);
    check(SamplerConfig::new(10, 0), SamplerError::ZeroBatchSize);
    for (shard, num_shards) in [(0, 0), (2, 2), (usize::MAX, 3)] {
        let config = SamplerConfig {
            shard,
            num_shards,
            ..base.clone()
        };
        check(config, SamplerError::ShardOutOfRange { shard, num_shards });
    }
    let config = SamplerConfig {
        num_shards: 11,
        ..base.clone()
    };
    let (num_shards, num_examples) = (11, 10);
    check(
        config,
        SamplerError::TooManyShards {
            num_shards,
            num_examples,
        },
    );
    for (batch_size, num_shards) in [(11, 1), (4, 3), (usize::MAX, 2)] {
        let config = SamplerConfig {
            batch_size,
            num_shards,
            drop_last: true,
            ..base.clone()
        };
        let expected = SamplerError::NoFullBatch {
            batch_size,
            num_shards,
            num_examples: 10,
        };
        check(config, expected);
    }
}

#[test]
fn a_batch_larger_than_the_data_set_is_one_whole_epoch() {
    let mut sampler = sampler(SamplerConfig::new(10, usize::MAX));
    assert_eq!(sampler.batches_per_epoch(), 1);
    assert_eq!(sampler.next_batch().len(), 10);
}

#[test]
fn a_cursor_behind_the_end_is_refused_and_changes_nothing() {
    let mut sampler = sampler(SamplerConfig::new(10, 4));
    sampler.next_batch();
    let before = sampler.cursor();
    let error = sampler.seek(Cursor { epoch: 0, batch: 3 });
    let (batch, batches_per_epoch) = (3, 3);
    let expected = SamplerError::CursorOutOfRange {
        batch,
        batches_per_epoch,
    };
    assert_eq!(error, Err(expected));
    assert_eq!(sampler.cursor(), before);
}

#[test]
fn the_last_possible_epoch_is_followed_by_the_first() {
    let mut sampler = sampler(SamplerConfig::new(10, 10));
    let epoch = u64::MAX;
    sampler.seek(Cursor { epoch, batch: 0 }).expect("in range");
    sampler.next_batch();
    assert_eq!(sampler.cursor(), Cursor::default());
}
