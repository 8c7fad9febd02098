//! The data sets of the MNIST family: file names, mirrors, checksums, sample.

use sha2::{Digest, Sha256};

use crate::Normalization;
use crate::idx::{Idx, Kind, is_gzip};

/// Height and width of every image of the family.
pub(crate) const IMAGE_SIZE: u32 = 28;

/// Number of classes of every member of the family.
pub(crate) const NUM_CLASSES: usize = 10;

impl Kind {
    /// The contents of the family's image files.
    pub(crate) const IMAGES: Self = Self::Images {
        height: IMAGE_SIZE,
        width: IMAGE_SIZE,
    };

    /// The contents of the family's label files.
    pub(crate) const LABELS: Self = Self::Labels {
        num_classes: NUM_CLASSES,
    };
}

/// A data set of four IDX files.
#[derive(Debug)]
pub(crate) struct Spec {
    pub(crate) name: &'static str,
    /// Folder under `ps` in the user's cache.
    pub(crate) folder: &'static str,
    /// Folder that torchvision makes in its `root`; the files are in `raw` under it.
    pub(crate) torchvision: &'static str,
    /// Environment variable that can name a directory.
    pub(crate) variable: &'static str,
    /// Base URLs, tried in order.
    #[cfg_attr(
        not(feature = "download"),
        expect(dead_code, reason = "only downloads use it")
    )]
    pub(crate) mirrors: &'static [&'static str],
    pub(crate) normalization: Normalization,
    pub(crate) train: Pair,
    pub(crate) test: Pair,
    pub(crate) sample: Option<&'static Sample>,
}

impl Spec {
    /// The names of the four files, without `.gz`.
    pub(crate) fn names(&self) -> impl Iterator<Item = &'static str> {
        self.files().map(|(file, _)| file.name).into_iter()
    }

    /// The four files, each with what it holds; the small ones first.
    pub(crate) fn files(&self) -> [(&DataFile, Kind); 4] {
        [
            (&self.train.labels, Kind::LABELS),
            (&self.test.labels, Kind::LABELS),
            (&self.test.images, Kind::IMAGES),
            (&self.train.images, Kind::IMAGES),
        ]
    }
}

/// Image and label file of one split.
#[derive(Debug)]
pub(crate) struct Pair {
    pub(crate) images: DataFile,
    pub(crate) labels: DataFile,
}

/// One published file.
#[derive(Debug)]
pub(crate) struct DataFile {
    /// Name without `.gz`.
    pub(crate) name: &'static str,
    pub(crate) checksum: Checksum,
}

/// SHA-256 of a published file.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Checksum {
    /// Of the uncompressed file. It does not depend on how a mirror compresses the file.
    Content([u8; 32]),
    /// Of the gzip file as published.
    Gzip([u8; 32]),
}

impl Checksum {
    /// Returns the expected and found checksums in hexadecimal if they differ.
    pub(crate) fn mismatch(self, raw: &[u8], idx: &Idx) -> Option<(String, String)> {
        let (expected, found) = match self {
            Self::Content(expected) => (expected, idx.content_sha256()),
            Self::Gzip(expected) => (expected, Sha256::digest(raw).into()),
        };
        (expected != found).then(|| (to_hex(expected), to_hex(found)))
    }
}

/// Returns a warning if a file in a user's directory is not, or may not be, the published one.
///
/// MNIST and FashionMNIST have files with the same names, so a file is compared with those of all data
/// sets in `known`.
pub(crate) fn suspicion(
    known: &[&Spec],
    spec: &Spec,
    file: &DataFile,
    raw: &[u8],
    idx: &Idx,
) -> Option<String> {
    let content = idx.content_sha256();
    let compressed: Option<[u8; 32]> = is_gzip(raw).then(|| Sha256::digest(raw).into());
    let matches = |checksum| match checksum {
        Checksum::Content(expected) => expected == content,
        Checksum::Gzip(expected) => Some(expected) == compressed,
    };
    if matches(file.checksum) {
        return None;
    }
    let (name, set) = (file.name, spec.name);
    let others = known
        .iter()
        .flat_map(|other| other.files().map(|(file, _)| (file, other.name)));
    for (other, other_set) in others {
        if matches(other.checksum) {
            return Some(format!(
                "is {} of {other_set}, not {name} of {set}",
                other.name
            ));
        }
    }
    Some(match (file.checksum, compressed) {
        (Checksum::Gzip(_), None) => format!(
            "cannot be compared with the published {name} of {set}, whose checksum is that of the \
             compressed file; give {name}.gz to have it checked"
        ),
        _ => format!("is not the published file of {set}"),
    })
}

/// Gzip-compressed image and label files compiled into the crate.
#[derive(Debug)]
pub(crate) struct Sample {
    pub(crate) train: [&'static [u8]; 2],
    pub(crate) test: [&'static [u8]; 2],
}

/// All data sets whose published files are known.
pub(crate) static KNOWN: [&Spec; 2] = [&MNIST, &FASHION_MNIST];

/// The checksums were computed from the published files. The MD5 sums of these files are those that
/// torchvision and others list for the uncompressed files.
pub(crate) static MNIST: Spec = Spec {
    name: "MNIST",
    folder: "mnist",
    torchvision: "MNIST",
    variable: "PS_MNIST_DIR",
    mirrors: &[
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
    ],
    normalization: Normalization::MNIST,
    train: Pair {
        images: DataFile {
            name: "train-images-idx3-ubyte",
            checksum: Checksum::Content(hex(
                "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            )),
        },
        labels: DataFile {
            name: "train-labels-idx1-ubyte",
            checksum: Checksum::Content(hex(
                "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            )),
        },
    },
    test: Pair {
        images: DataFile {
            name: "t10k-images-idx3-ubyte",
            checksum: Checksum::Content(hex(
                "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            )),
        },
        labels: DataFile {
            name: "t10k-labels-idx1-ubyte",
            checksum: Checksum::Content(hex(
                "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            )),
        },
    },
    sample: Some(&MNIST_SAMPLE),
};

/// 4,000 training and 1,000 test images of the real data; see `sample/README.md`.
pub(crate) static MNIST_SAMPLE: Sample = Sample {
    train: [ps_mnist_sample::TRAIN_IMAGES, ps_mnist_sample::TRAIN_LABELS],
    test: [ps_mnist_sample::TEST_IMAGES, ps_mnist_sample::TEST_LABELS],
};

/// Checksums of the gzip files as published, from torchvision's prototype data sets
/// (`torchvision/prototype/datasets/_builtin/mnist.py`).
pub(crate) static FASHION_MNIST: Spec = Spec {
    name: "FashionMNIST",
    folder: "fashion-mnist",
    torchvision: "FashionMNIST",
    variable: "PS_FASHION_MNIST_DIR",
    mirrors: &[
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    ],
    normalization: Normalization::FASHION_MNIST,
    train: Pair {
        images: DataFile {
            name: "train-images-idx3-ubyte",
            checksum: Checksum::Gzip(hex(
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            )),
        },
        labels: DataFile {
            name: "train-labels-idx1-ubyte",
            checksum: Checksum::Gzip(hex(
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            )),
        },
    },
    test: Pair {
        images: DataFile {
            name: "t10k-images-idx3-ubyte",
            checksum: Checksum::Gzip(hex(
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            )),
        },
        labels: DataFile {
            name: "t10k-labels-idx1-ubyte",
            checksum: Checksum::Gzip(hex(
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            )),
        },
    },
    sample: None,
};

/// Reads 64 lower-case hexadecimal digits at compile time.
const fn hex(digits: &str) -> [u8; 32] {
    const fn value(digit: u8) -> u8 {
        match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => panic!("a checksum has lower-case hexadecimal digits only"),
        }
    }
    let digits = digits.as_bytes();
    assert!(digits.len() == 64, "a SHA-256 has 64 digits");
    let mut bytes = [0; 32];
    let mut i = 0;
    while i < 32 {
        bytes[i] = value(digits[2 * i]) << 4 | value(digits[2 * i + 1]);
        i += 1;
    }
    bytes
}

fn to_hex(bytes: [u8; 32]) -> String {
    bytes.map(|byte| format!("{byte:02x}")).concat()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::{Compression, write::GzEncoder};

    use super::*;
    use crate::idx::decode;

    /// Names, files and checksums of a data set whose files hold `labels`.
    fn made_of(name: &'static str, checksum: Checksum) -> Spec {
        let file = |name, checksum| DataFile { name, checksum };
        let none = Checksum::Content([0; 32]);
        Spec {
            name,
            folder: "",
            torchvision: "",
            variable: "",
            mirrors: &[],
            normalization: Normalization::UNIT,
            train: Pair {
                images: file("train-images-idx3-ubyte", none),
                labels: file("train-labels-idx1-ubyte", checksum),
            },
            test: Pair {
                images: file("t10k-images-idx3-ubyte", none),
                labels: file("t10k-labels-idx1-ubyte", none),
            },
            sample: None,
        }
    }

    #[test]
    fn a_file_of_another_data_set_is_recognized_though_it_has_the_same_name() {
        let [digits, clothes] = [
            MNIST_SAMPLE.train[1],
            // Another file, as large as labels are.
            MNIST_SAMPLE.test[1],
        ];
        let decoded = |raw: &[u8]| decode(raw, Kind::LABELS).expect("valid");
        let mnist = made_of("MNIST", Checksum::Content(decoded(digits).content_sha256()));
        let fashion = made_of(
            "FashionMNIST",
            Checksum::Gzip(Sha256::digest(clothes).into()),
        );
        let known = [&mnist, &fashion];
        let plain = |raw: &[u8]| plain_of(&decoded(raw).body);
        let check = |spec: &Spec, raw: &[u8], expected: Option<&str>| {
            let found = suspicion(&known, spec, &spec.train.labels, raw, &decoded(raw));
            match (&found, expected) {
                (None, None) => {}
                (Some(found), Some(expected)) if found.contains(expected) => {}
                _ => panic!("{}: {found:?} and {expected:?}", spec.name),
            }
        };
        let is_mnist = Some("is train-labels-idx1-ubyte of MNIST, not");
        let is_fashion = Some("is train-labels-idx1-ubyte of FashionMNIST, not");
        check(&mnist, digits, None);
        check(&mnist, &plain(digits), None);
        check(&mnist, clothes, is_fashion);
        check(
            &mnist,
            &plain(clothes),
            Some("is not the published file of MNIST"),
        );
        check(&fashion, clothes, None);
        check(&fashion, digits, is_mnist);
        check(&fashion, &plain(digits), is_mnist);
        check(&fashion, &plain(clothes), Some("cannot be compared"));
        // One's own data, in a file that is compressed.
        check(
            &fashion,
            &gzip(&plain_of(&[1, 2])),
            Some("is not the published"),
        );
        // The other half of the same data set.
        let found = suspicion(&known, &mnist, &mnist.test.labels, digits, &decoded(digits));
        let found = found.expect("training data in place of test data");
        assert!(found.contains("is train-labels-idx1-ubyte of MNIST, not t10k-labels"));
    }

    fn plain_of(labels: &[u8]) -> Vec<u8> {
        let header = [0x0801, labels.len() as u32].map(u32::to_be_bytes).concat();
        [header, labels.to_vec()].concat()
    }

    fn gzip(content: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(content).expect("writing to memory");
        encoder.finish().expect("writing to memory")
    }

    #[test]
    fn checksums_survive_hexadecimal() {
        let digits = "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db";
        assert_eq!(to_hex(hex(digits)), digits);
        assert_eq!(hex(digits)[..3], [0xba, 0x89, 0x10]);
    }
}
