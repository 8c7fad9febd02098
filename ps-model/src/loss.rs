//! Loss and score of a classifier.

use burn::tensor::{Int, Tensor};

/// Returns the mean negative log likelihood of the targets, a tensor of one number.
///
/// `log_probabilities: [batch, classes]`, as from log-softmax; `targets: [batch]`, each in
/// `0..classes`. Formula: <https://docs.pytorch.org/docs/stable/generated/torch.nn.NLLLoss.html>
/// with `reduction='mean'` and no weights.
///
/// # Panics
///
/// If the batch sizes differ. A target out of range may panic or give a wrong number, depending
/// on the backend; [`ImageBatch`](crate::ImageBatch) checks its labels.
#[must_use]
pub fn nll_loss(log_probabilities: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    let [batch, _classes] = log_probabilities.dims();
    let [num_targets] = targets.dims();
    assert_eq!(batch, num_targets, "one target for each row");
    log_probabilities
        .gather(1, targets.unsqueeze_dim::<2>(1))
        .mean()
        .neg()
}

/// Counts the rows whose largest log probability is that of the target.
///
/// Shapes as for [`nll_loss`].
///
/// # Panics
///
/// If the batch sizes differ.
#[must_use]
pub fn num_correct(log_probabilities: Tensor<2>, targets: Tensor<1, Int>) -> usize {
    let [batch, _classes] = log_probabilities.dims();
    let [num_targets] = targets.dims();
    assert_eq!(batch, num_targets, "one target for each row");
    let predicted: Tensor<1, Int> = log_probabilities.argmax(1).squeeze_dim(1);
    let correct = predicted.equal(targets).int().sum().into_scalar::<i64>();
    usize::try_from(correct).expect("a count of rows is not negative")
}
