//! The messages of the parameter server as bytes, whole and damaged.

use proptest::prelude::*;
use ps_actors::buffer::Buffer;
use ps_actors::codec::{CodecError, Encoded, MAX_HEADER, decode, encode};
use ps_actors::ids::{Clock, GradientId, Incarnation, JoinRequest, Version, WorkerId};
use ps_actors::remote::untraced;
use ps_actors::server::{
    ApplyGradients, GroupError, Join, ParameterServer, Pushed, Reduction, ServerError, Stage,
};
use ps_actors::weights::{Gradient, GradientUpdate, Layout, Weights};
use ps_actors::worker::{DataWorker, LocalGradient, RunReport, SourceError, WorkerError};
use ps_runtime::test_util::transport;

type Source = fn(Clock, &Weights) -> Result<LocalGradient, SourceError>;

#[test]
fn the_fields_of_all_messages_are_compared() {
    let none: [&str; 0] = [];
    assert_eq!(untraced::<ParameterServer>(), none);
    assert_eq!(untraced::<DataWorker<Source>>(), none);
}

fn gradients(values: Vec<f32>) -> GradientUpdate {
    let (worker, incarnation) = (WorkerId(3), Incarnation(u64::MAX));
    GradientUpdate {
        id: GradientId {
            worker,
            incarnation,
            clock: Clock(7),
        },
        computed_on: Version(6),
        loss: 0.25,
        num_examples: 32,
        gradient: Gradient::new(values),
    }
}

proptest! {
    #[test]
    fn what_is_encoded_comes_back_bit_for_bit(
        first in proptest::collection::vec(any::<f32>(), 0..100),
        second in proptest::collection::vec(any::<f32>(), 0..100),
    ) {
        let sent = ApplyGradients {
            gradients: vec![gradients(first.clone()), gradients(second.clone())],
            reduction: Reduction::Sum,
        };
        let got = transport(&sent).unwrap();
        prop_assert_eq!(got.reduction, sent.reduction);
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        for (got, sent) in got.gradients.iter().zip(&sent.gradients) {
            prop_assert_eq!(bits(got.gradient.values()), bits(sent.gradient.values()));
            prop_assert_eq!(got.gradient.norm().to_bits(), sent.gradient.norm().to_bits());
            prop_assert_eq!((got.id, got.computed_on), (sent.id, sent.computed_on));
        }
    }

    /// PS-6: whatever a peer sends is a message or an error.
    #[test]
    fn arbitrary_bytes_do_no_harm(
        header in proptest::collection::vec(any::<u8>(), 0..200),
        lengths in proptest::collection::vec(0usize..20, 0..4),
    ) {
        let bulk = || lengths.iter().map(|&len| Buffer::from(vec![0.5; len])).collect();
        let _ = decode::<ApplyGradients>(&header, bulk());
        let _ = decode::<Weights>(&header, bulk());
        let _ = decode::<Stage>(&header, bulk());
        let _ = decode::<Result<Pushed, ServerError>>(&header, bulk());
        let _ = decode::<Result<RunReport, WorkerError>>(&header, bulk());
        let _ = decode::<GroupError>(&header, bulk());
    }

    /// A message that was damaged on the way, in header or buffers.
    #[test]
    fn damaged_messages_do_no_harm(place: prop::sample::Index, byte: u8, len in 0usize..20) {
        // The first travels with 16 bits (S-23).
        for number in [1.0, 1.1] {
            let Encoded { mut header, .. } = encode(&gradients(vec![number; 10])).unwrap();
            *place.get_mut(&mut header) = byte;
            let _ = decode::<GradientUpdate>(&header, vec![Buffer::from(vec![1.0; len])]);
        }
    }
}

/// PS-6: a peer that claims a text of a terabyte gets no memory for it.
#[test]
fn a_claimed_length_is_refused_before_there_is_room_for_it() {
    let sent: Result<RunReport, WorkerError> = Err(WorkerError::Source {
        worker: WorkerId(3),
        clock: Clock(7),
        source: "".into(),
    });
    let Encoded { mut header, .. } = encode(&sent).unwrap();
    assert_eq!(header.pop(), Some(0), "the length of the empty text");
    // 253 says that the eight bytes of a number follow.
    header.push(253);
    header.extend((1u64 << 40).to_le_bytes());
    let got = decode::<Result<RunReport, WorkerError>>(&header, vec![]);
    let Err(CodecError::Decode { source, .. }) = got else {
        panic!("{got:?}");
    };
    assert_eq!(source.to_string(), "LimitExceeded");
}

#[test]
fn the_bulk_is_shared_and_the_header_small() {
    let message = gradients(vec![0.1; 100_000]);
    let encoded = encode(&message).unwrap();
    assert!(encoded.header.len() < 64, "{} bytes", encoded.header.len());
    assert!(std::ptr::eq(
        encoded.bulk[0].as_ptr(),
        message.gradient.values().as_ptr()
    ));
}

#[test]
fn a_part_of_a_gradient_travels_alone() {
    let whole = Gradient::new((0..10).map(|i| i as f32).collect::<Vec<_>>());
    let sent = Stage {
        id: gradients(vec![]).id,
        gradient: whole.slice(4..7),
    };
    let got = transport(&sent).unwrap().gradient;
    assert_eq!((got.range(), got.values()), (4..7, &[4.0, 5.0, 6.0][..]));
    assert_eq!(got.norm(), whole.norm());
    assert_eq!(got.slice(5..6).values(), [5.0]);
}

#[test]
fn a_snapshot_travels_with_its_version_and_layout() {
    let sent = Weights::initial(Layout::flat(5), vec![1.0, 2.0, 3.0, 4.0, 5.0]);
    let got = transport(&sent).unwrap();
    assert_eq!(
        (got.version(), got.layout()),
        (sent.version(), sent.layout())
    );
    assert_eq!(got.to_vec(), sent.to_vec());
}

/// A peer cannot slip a gradient past the guard by claiming a harmless norm.
#[test]
fn a_norm_that_does_not_fit_the_numbers_is_refused() {
    for bad in [f32::NAN, f32::INFINITY, 1e6] {
        let Encoded { header, .. } = encode(&gradients(vec![1.1; 3])).unwrap();
        let decoded = |numbers| decode::<GradientUpdate>(&header, vec![Buffer::from(numbers)]);
        decoded(vec![1.1; 3]).unwrap();
        let error = decoded(vec![1.1, bad, 1.1]);
        assert!(
            matches!(error, Err(CodecError::Decode { .. })),
            "{bad}: {error:?}"
        );
    }
}

#[test]
fn too_much_and_too_little_are_refused() {
    let join = Join {
        worker: WorkerId(1),
        request: JoinRequest(2),
    };
    let Encoded { mut header, .. } = encode(&join).unwrap();
    let extra = decode::<Join>(&header, vec![Buffer::from(vec![0.0])]).unwrap_err();
    assert!(
        extra.to_string().contains("1 buffers are left over"),
        "{extra}"
    );
    header.push(0);
    assert!(matches!(
        decode::<Join>(&header, vec![]),
        Err(CodecError::LeftOver { .. })
    ));
    let long = vec![0; MAX_HEADER + 1];
    assert!(matches!(
        decode::<Join>(&long, vec![]),
        Err(CodecError::TooLong { .. })
    ));
    let Encoded { header, .. } = encode(&gradients(vec![1.0; 3])).unwrap();
    let missing = decode::<GradientUpdate>(&header, vec![]);
    assert!(
        matches!(missing, Err(CodecError::Decode { .. })),
        "{missing:?}"
    );
    assert!(decode::<Pushed>(&[], vec![]).is_err());
}
