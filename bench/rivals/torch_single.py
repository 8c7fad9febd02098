"""PyTorch in one process, with no framework around it: the baseline."""

import torch
import torch.nn.functional as F

import common


def main():
    args = common.arguments()
    model = common.new_model(args)
    batches, evaluator = common.Batches(args, 0, 1), common.Evaluator(args)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.learning_rate)

    def train(steps):
        for _ in range(steps):
            data, target = batches.next()
            optimizer.zero_grad()
            F.nll_loss(model(data), target).backward()
            optimizer.step()

    common.measure(args, 1, train, lambda: evaluator.accuracy(model))


if __name__ == "__main__":
    main()
