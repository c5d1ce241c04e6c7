"""Subclasses of batch normalization, of the forms that libraries have, that take no statistics but synchronized ones."""

import torch
import torch.nn.functional as F

from conversions import CHANNELS


class Compact(torch.nn.BatchNorm1d):
    """The form of most: batch_norm, then what works on each value."""

    def __init__(self):
        super().__init__(CHANNELS)
        self.act, self.slope = torch.nn.PReLU(), torch.nn.Parameter(torch.ones(CHANNELS))

    def normalized(self, x):
        if self.training:
            self.num_batches_tracked.add_(1)
        statistics = (self.running_mean, self.running_var)
        return F.batch_norm(x, *statistics, self.weight, self.bias, self.training, self.momentum, self.eps)

    def forward(self, x):
        return self.act(F.dropout(self.normalized(x), 0.0)) * self.slope


class Wide(Compact):
    """Computes in another type."""

    def forward(self, x):
        return self.normalized(x.double()).to(x.dtype)


class Gated(Compact):
    """Takes a mean over each row."""

    def forward(self, x):
        return self.normalized(x) * torch.sigmoid(x.mean(1, keepdim=True))


class Enhanced(torch.nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x * torch.sigmoid(x.mean((2, 3), keepdim=True)))


class Shuffled(Compact):
    """Moves the rows, and moves them back."""

    def forward(self, x):
        order = torch.randperm(len(x))
        return self.normalized(x[order])[torch.argsort(order)]


class Transposed(Compact):
    """Returns its rows elsewhere."""

    def forward(self, x):
        return self.normalized(x).flip(1)


class Halves(Compact):
    """Normalizes parts of the batch, one after another."""

    def forward(self, x):
        return torch.cat([self.normalized(part) for part in x.split([len(x) // 2, len(x) - len(x) // 2])])


class Affine(torch.nn.BatchNorm1d):
    """A frozen one: it never takes statistics."""

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale + (self.bias - self.running_mean * scale)


class OfRows(torch.nn.BatchNorm1d):
    """Normalizes each row by itself."""

    def forward(self, x):
        return (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + self.eps).sqrt()


class Identity(torch.nn.BatchNorm1d):
    def forward(self, x):
        return x


class Delegating(torch.nn.BatchNorm1d):
    """Leaves normalization to one of several layers within it."""

    def __init__(self):
        super().__init__(CHANNELS)
        self.domains = torch.nn.ModuleList([torch.nn.BatchNorm1d(CHANNELS), Compact()])

    def forward(self, x):
        return self.domains[0](x) + self.domains[1](x)


class CallsItself(torch.nn.BatchNorm1d):
    """Normalizes in its __call__."""

    def __call__(self, x):
        return F.batch_norm(x.sin(), self.running_mean, self.running_var, self.weight, self.bias, True, 0.1, self.eps) * 2


class AroundItsCall(torch.nn.BatchNorm1d):
    def __call__(self, x):
        return super().__call__(x.sin()) * 2


class Tuple(Compact):
    """Returns other values beside its output."""

    def forward(self, x):
        y = self.normalized(x)
        return y, y.detach().pow(2).mean()


class First(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


HONEST = {
    "compact": Compact,
    "wide": Wide,
    "gated": Gated,
    "shuffled": Shuffled,
    "transposed": Transposed,
    "frozen": lambda: Affine(CHANNELS),
    "of rows": lambda: OfRows(CHANNELS),
    "identity": lambda: Identity(CHANNELS),
    "delegating": Delegating,
    "own __call__": lambda: CallsItself(CHANNELS),
    "around its __call__": lambda: AroundItsCall(CHANNELS),
    "tuple": lambda: First(Tuple()),
}
