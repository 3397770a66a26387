import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler

from modules.normalize import Standardize

X = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32) * [1, 10, 0.1, 0] + [5, 0, -3, 7]
X = torch.tensor(X, dtype=torch.float32)


def test_per_column_is_the_scaling_of_sklearn():
    standardize = Standardize(4)
    standardize.fit(X, per_column=True)
    np.testing.assert_allclose(standardize(X), StandardScaler().fit_transform(X), atol=1e-4)


def test_globally_all_columns_share_one_scale():
    standardize = Standardize(4)
    standardize.fit(X, per_column=False)
    centred = X.double().numpy() - X.double().numpy().mean(0)
    np.testing.assert_allclose(standardize(X), centred / np.sqrt((centred**2).mean()), atol=1e-4)


@pytest.mark.parametrize("per_column", [True, False])
def test_inverse_undoes_and_constants_travel_in_the_weights(per_column):
    fitted, loaded = Standardize(4), Standardize(4)
    assert torch.equal(fitted(X), X), "the identity before fit"
    fitted.fit(X, per_column)
    loaded.load_state_dict(fitted.state_dict())
    torch.testing.assert_close(loaded.inverse(fitted(X)), X, atol=1e-4, rtol=1e-4)
